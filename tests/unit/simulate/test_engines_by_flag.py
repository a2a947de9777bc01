"""`--engine`: another engine is another way to the same model."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from fedshelf.core.events import RunStatus
from fedshelf.simulate.engine import simulate
from fedshelf.tracking.queries import run_summary
from fedshelf.training.resources import default_threads
from tests.unit.simulate.test_simulation import config, final, stores

__all__ = ["stores"]  # a fixture


def test_clients_computed_together_come_to_the_model_of_clients_one_by_one(
    stores: Path, caplog: pytest.LogCaptureFixture
) -> None:
    finals = []
    with caplog.at_level(logging.WARNING):
        for engine in ("local", "vmap"):
            status, directory = simulate(config(engine=engine, rounds=1, norm="group", width=8, run_dir=Path(engine)))
            assert status is RunStatus.FINISHED
            finals.append(final(directory))
    assert "vmap engine cannot" not in caplog.text
    assert not torch.equal(*finals), "not computed otherwise: the flag does nothing"
    torch.testing.assert_close(*finals, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("with_ray")
def test_a_ray_cluster_comes_to_the_same_bits(stores: Path) -> None:
    finals = []
    for engine, workers in (("local", 0), ("ray", 2)):
        values = {"codec_up": "topk:0.3+int8", "codec_down": "int4"}
        _, directory = simulate(config(engine=engine, workers=workers, rounds=3, run_dir=Path(engine), **values))
        finals.append((final(directory), [r.central_accuracy for r in run_summary(directory.path).rounds]))
    assert torch.equal(finals[0][0], finals[1][0])
    assert finals[0][1] == finals[1][1]


@pytest.mark.slow
def test_workers_may_compute_their_shares_together(stores: Path) -> None:
    finals = []
    for engine, workers in (("local", 2), ("vmap", 2)):
        values = {"rounds": 1, "norm": "group", "width": 8}
        _, directory = simulate(config(engine=engine, workers=workers, run_dir=Path(engine), **values))
        finals.append(final(directory))
    assert not torch.equal(*finals), "not computed otherwise: the flag does nothing"
    torch.testing.assert_close(*finals, rtol=0, atol=1e-5)


def test_a_resumed_run_keeps_the_engine_that_was_chosen_at_its_start(stores: Path) -> None:
    values = {"engine": "auto", "norm": "group", "width": 8, "rounds": 1}
    _, first = simulate(config(run_dir=Path("first"), **values))
    chosen = json.loads(first.engine.read_text())
    assert chosen["engine"] in ("local", "vmap")
    assert "ms" in chosen["reason"]
    finals = []
    for engine in ("local", "vmap"):
        shutil.copytree(first.path, Path(engine))
        (Path(engine) / "engine.json").write_text(json.dumps({"engine": engine, "reason": "the trial said so"}))
        _, directory = simulate(config(run_dir=Path(engine), extend=1, **values))
        finals.append(final(directory))
    assert not torch.equal(*finals), "what was written down makes no difference"
    torch.testing.assert_close(*finals, rtol=0, atol=1e-4)


def test_threads_chosen_by_the_machine_are_written_down(stores: Path) -> None:
    _, directory = simulate(config(threads=0, rounds=1, run_dir=Path("run")))
    assert f"threads = {default_threads()}" in (directory.path / "config.toml").read_text()
