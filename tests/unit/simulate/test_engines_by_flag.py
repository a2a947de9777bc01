"""`--engine`: another engine is another way to the same model."""

import logging
from pathlib import Path

import pytest
import torch

from fedshelf.core.errors import UsageError
from fedshelf.core.events import RunStatus
from fedshelf.simulate.engine import simulate
from fedshelf.tracking.queries import run_summary
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
def test_a_ray_cluster_comes_to_the_same_bits(stores: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'fedshelf[ray]'")
    finals = []
    for engine, workers in (("local", 0), ("ray", 2)):
        values = {"codec_up": "topk:0.3+int8", "codec_down": "int4"}
        _, directory = simulate(config(engine=engine, workers=workers, rounds=3, run_dir=Path(engine), **values))
        finals.append((final(directory), [r.central_accuracy for r in run_summary(directory.path).rounds]))
    assert torch.equal(finals[0][0], finals[1][0])
    assert finals[0][1] == finals[1][1]


def test_one_computation_has_no_use_for_workers(stores: Path) -> None:
    from fedshelf.config.files import parse
    from fedshelf.config.schema import RunConfig

    with pytest.raises(UsageError, match="leave workers out"):
        parse(RunConfig, {"engine": "vmap", "workers": 2, "data-dir": "stores"}, where="here")
