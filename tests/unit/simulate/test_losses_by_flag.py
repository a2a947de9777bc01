"""`--loss`: simulated by every engine, and said on the command line."""

import json
import logging
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fedshelf.cli.app import app
from fedshelf.core.events import RunStatus
from fedshelf.simulate.engine import simulate
from tests.unit.simulate.test_simulation import config, final, stores

__all__ = ["stores"]  # a fixture: two of its three stores sell no tea


def run(name: str, loss: str, **values: object) -> torch.Tensor:
    status, directory = simulate(config(loss=loss, rounds=1, norm="group", width=8, run_dir=Path(name), **values))
    assert status is RunStatus.FINISHED
    return final(directory)


@pytest.mark.parametrize("loss", ["fedrs", "fedlc"])
def test_clients_computed_together_come_to_the_model_of_clients_one_by_one(
    stores: Path, loss: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        alone, together = (run(engine, loss, engine=engine) for engine in ("local", "vmap"))
    assert "vmap engine cannot" not in caplog.text
    assert not torch.equal(alone, together), "not computed otherwise: the flag does nothing"
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    assert not torch.allclose(alone, run("plain", "cross-entropy"), rtol=0, atol=1e-4)


def told(*arguments: str) -> str:
    """What a command writes that ends well."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_line_trains_with_the_loss_it_is_told(stores: Path) -> None:
    losses = {}
    for name, flags in {
        "plain": "",
        "fedlc": "--loss fedlc",
        "without margins": "--loss fedlc --fedlc-tau 0",
        "fedrs": "--loss fedrs",
        "strict": "--loss fedrs --fedrs-alpha 0",
        "as plain": "--loss fedrs --fedrs-alpha 1",
    }.items():
        small = ["--data-dir", "stores", "--rounds", "1", "--image-size", "16", "--width", "8", "--device", "cpu"]
        told("simulate", *small, "--run-dir", name, *flags.split())
        (record,) = json.loads(told("runs", "show", name, "--json"))["rounds"]
        losses[name] = record["train_loss"]
    assert losses.pop("as plain") == pytest.approx(losses["plain"], abs=1e-4)
    assert all(after - before > 1e-3 for before, after in pairwise(sorted(losses.values()))), losses
