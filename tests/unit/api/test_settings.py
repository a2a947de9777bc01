"""Algorithms as objects are recorded as by flags."""

from pathlib import Path
from typing import Any

import pytest

from fedshelf import algorithms
from fedshelf.algorithms.registry import ALGORITHMS
from fedshelf.api.settings import config_of
from fedshelf.app.components import algorithm_of
from fedshelf.config.files import effective
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import UsageError

INSTANCES: list[tuple[Any, dict[str, Any]]] = [
    (algorithms.FedAvg(), {"algorithm": "fedavg"}),
    (algorithms.FedProx(), {"algorithm": "fedprox"}),
    (algorithms.FedProx(mu=0.5), {"algorithm": "fedprox", "mu": 0.5}),
    (algorithms.FedAvgM(server_lr=0.5), {"algorithm": "fedavgm", "server_lr": 0.5}),
    (algorithms.FedAdam(tau=0.1), {"algorithm": "fedadam", "server_tau": 0.1}),
    (algorithms.FedYogi(server_lr=0.2, beta2=0.9), {"algorithm": "fedyogi", "server_lr": 0.2, "server_beta2": 0.9}),
    (algorithms.FedAdagrad(), {"algorithm": "fedadagrad"}),
    (algorithms.Scaffold(), {"algorithm": "scaffold"}),
    (algorithms.Ridge(), {"algorithm": "ridge"}),
    (algorithms.FedBuff(buffer_size=2, max_staleness=3),
     {"algorithm": "fedbuff", "buffer_size": 2, "max_staleness": 3}),
    (algorithms.FedAsync(alpha=0.3, rho=0.0), {"algorithm": "fedasync", "server_lr": 0.3, "mu": 0.0}),
]  # fmt: skip


@pytest.mark.parametrize(("instance", "flags"), INSTANCES, ids=lambda value: str(value)[:30])
def test_an_instance_gives_the_configuration_that_flags_give(instance: Any, flags: dict[str, Any]) -> None:
    config = config_of(RunConfig, "simulate", {}, algorithm=instance)
    assert effective(config) == effective(config_of(RunConfig, "simulate", flags))
    assert algorithm_of(config) == instance


def test_every_registered_algorithm_is_exported() -> None:
    assert {flags["algorithm"] for _, flags in INSTANCES} == set(ALGORITHMS)


def test_an_instance_wins_over_a_file_with_its_defaults_too(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('algorithm = "fedavg"\nmu = 0.7\nrounds = 4\n')
    config = config_of(RunConfig, "server", {}, file=file, algorithm=algorithms.FedProx())
    assert algorithm_of(config) == algorithms.FedProx(mu=0.01)
    assert config.rounds == 4


class Mine(algorithms.FedProx):
    """An algorithm that is not registered."""


def test_an_algorithm_that_clients_could_not_build_is_an_error() -> None:
    with pytest.raises(UsageError, match="is not a registered one"):
        config_of(RunConfig, "simulate", {}, algorithm=Mine())
