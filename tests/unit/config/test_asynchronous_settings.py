"""What asynchronous algorithms are told, and what they refuse to be told, before there is a run."""

from pathlib import Path
from typing import Any

import pytest

from fedshelf.algorithms.fedasync import FedAsync
from fedshelf.algorithms.fedbuff import FedBuff
from fedshelf.app.components import algorithm_of
from fedshelf.app.run import open_run
from fedshelf.config import files
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import UsageError


def config(**values: Any) -> RunConfig:
    return files.load(RunConfig, None, {"run_dir": Path("r"), **values})


def test_fedbuff_has_a_buffer_of_four_unless_told_otherwise() -> None:
    assert algorithm_of(config(algorithm="fedbuff")) == FedBuff(server_lr=1.0, buffer_size=4, exponent=0.5)
    told = config(algorithm="fedbuff", buffer_size=7, server_lr=0.3, staleness_exponent=0.2)
    assert algorithm_of(told) == FedBuff(server_lr=0.3, buffer_size=7, exponent=0.2)


def test_fedasync_is_told_its_alpha_and_rho_and_makes_a_version_of_every_upload() -> None:
    assert algorithm_of(config(algorithm="fedasync")) == FedAsync(alpha=0.6, rho=0.01, exponent=0.5)
    told = config(algorithm="fedasync", server_lr=0.3, mu=0.7, staleness_exponent=0.2)
    assert algorithm_of(told) == FedAsync(alpha=0.3, rho=0.7, exponent=0.2, buffer_size=1)


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("size", [2, 4])
def test_a_buffer_of_more_than_one_upload_is_none_of_fedasyncs(size: int) -> None:
    """Not even fedbuff's default, once somebody has asked for it."""
    with (
        pytest.raises(
            UsageError, match=f"--buffer-size {size} with --algorithm fedasync: .* every upload .* Leave .* fedbuff"
        ),
        open_run(config(algorithm="fedasync", buffer_size=size), watchers=()),
    ):
        pass
    assert not Path("r").exists()


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    "values",
    [
        {"algorithm": "fedasync"},
        {"algorithm": "fedasync", "buffer_size": 1},
        {"algorithm": "fedbuff", "buffer_size": 9},
    ],
)
def test_other_buffers_are_as_good_as_none_given(values: dict[str, Any]) -> None:
    with open_run(config(**values), watchers=()) as run:
        assert run.directory.path.is_dir()


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"aggregator": "multi-krum"}, "--aggregator multi-krum with --algorithm fedbuff: .* median"),
        ({"quorum": 2}, "--quorum with --algorithm fedbuff: .* --buffer-size"),
        ({"sampling": "size"}, "--sampling size with --algorithm fedbuff: .* Use uniform or availability"),
    ],
)
def test_what_makes_no_sense_without_cohorts_is_refused(values: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why), open_run(config(algorithm="fedbuff", **values), watchers=()):
        pass
    assert not Path("r").exists()
