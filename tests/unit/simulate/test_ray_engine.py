"""Clients played by Ray's actors: the very answers that one process gives."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedshelf.core.errors import FedShelfError, UsageError
from fedshelf.core.messages import Failure, Upload
from fedshelf.simulate.client_runner import InProcess
from fedshelf.simulate.ray_pool import RayPool
from fedshelf.training.trainer import total
from tests.unit.simulate.federations import Federation

SIZES = {"a": 11, "b": 8, "c": 4, "d": 9, "e": 13}


@pytest.mark.slow
@pytest.mark.usefixtures("with_ray")
def test_ray_s_actors_change_not_one_bit(tmp_path: Path) -> None:
    values: dict[str, Any] = {"local_epochs": 2, "algorithm": "fedprox", "mu": 0.5}
    federation = Federation.of(tmp_path, SIZES, test_photos=600, **values)
    alone = InProcess(federation.runner.run)
    federation.set_up(alone)
    expected = federation.round(alone, lr=0.05)
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    with RayPool(federation.runner, 2, threads=1) as pool:
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM], "what handles signals does so beside Ray, too"
        signal.signal(signal.SIGTERM, before)
        federation.set_up(pool)
        for number in (1, 2, 1):
            found = federation.round(pool, number=number, lr=0.05)
        for name in SIZES:
            assert isinstance(found[name], Upload), found[name]
            assert torch.equal(found[name].delta, expected[name].delta)
            assert found[name].train_loss == expected[name].train_loss
        shared_out = total(pool.evaluate(federation.setup, federation.start))
        assert shared_out == total(federation.runner.evaluate(federation.setup, federation.start))
        diverged = federation.round(pool, lr=1e30)
        assert {type(answer) for answer in diverged.values()} == {Failure}


MAIN = int(os.environ.setdefault("FEDSHELF_TEST_MAIN", str(os.getpid())))


class Failing(nn.Module):
    """Raises in training, or takes its process with it."""

    def __init__(self, num_classes: int, *, die: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 16 * 16, num_classes)
        self.die = die

    def forward(self, images: Tensor) -> Tensor:
        if self.die:
            os._exit(3)
        raise ValueError("the model is broken")


def dying(num_classes: int) -> nn.Module:
    return Failing(num_classes, die=True)


@pytest.mark.slow
@pytest.mark.usefixtures("with_ray")
def test_an_actor_that_dies_is_one_clear_error(tmp_path: Path) -> None:
    federation = Federation.of(tmp_path, SIZES, model=dying)
    with RayPool(federation.runner, 1, threads=1) as pool:
        federation.set_up(pool)
        with pytest.raises(FedShelfError, match=r"a Ray worker .*died"):
            federation.round(pool, lr=0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("with_ray")
def test_a_model_that_is_broken_is_each_clients_failure(tmp_path: Path) -> None:
    federation = Federation.of(tmp_path, SIZES, model=Failing)
    with RayPool(federation.runner, 1, threads=1) as pool:
        federation.set_up(pool)
        for answer in federation.round(pool, lr=0.05).values():
            assert isinstance(answer, Failure)
            assert "the model is broken" in answer.reason


def test_without_ray_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"install fedshelf\[ray\]"):
        RayPool(Federation.of(tmp_path, SIZES).runner, 1, threads=1)


@pytest.mark.slow
@pytest.mark.usefixtures("with_ray")
def test_a_cluster_that_is_not_there_is_a_wrong_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(UsageError, match="RAY_ADDRESS auto"):
        RayPool(Federation.of(tmp_path, SIZES).runner, 1, threads=1)
