"""What --norm-bound builds, alone and where masks hide single uploads."""

import logging
from typing import Any

import pytest

from fedshelf.algorithms.robust import AutoNormBound, NormBound
from fedshelf.app import components, run, run_validation
from fedshelf.config import files
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import UsageError
from fedshelf.core.stages import Declaration
from fedshelf.rounds.pipeline import UploadPipeline


class Mask:
    """As much of a masking stage as a configuration asks about."""

    declares = Declaration(name="mask", setting="--secure-aggregation", masks=True)


@pytest.fixture
def masked(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline: Any = UploadPipeline(stages=(Mask(),))  # type: ignore[arg-type]
    monkeypatch.setattr(components, "uploads_of", lambda config: pipeline)
    monkeypatch.setattr(run_validation, "uploads_of", lambda config: pipeline)


@pytest.mark.parametrize(
    ("given", "screens"), [({}, (AutoNormBound(),)), ({"norm_bound": "auto"}, (AutoNormBound(),)),
    ({"norm_bound": "off"}, ()), ({"norm_bound": "3"}, (NormBound(3.0),)), ({"norm_bound": 0.5}, (NormBound(0.5),))],
)  # fmt: skip
def test_a_bound_is_automatic_unless_it_is_a_number_or_off(given: dict[str, Any], screens: tuple[Any, ...]) -> None:
    assert components.aggregator_of(files.load(RunConfig, None, given)).screens == screens


@pytest.mark.parametrize("value", ["none", "-1", 0, "nan", "inf", True])
def test_another_value_is_refused_with_what_is_possible(value: Any) -> None:
    with pytest.raises(UsageError, match=r"--norm-bound .*: must be auto, off, or a number above 0"):
        files.load(RunConfig, None, {"norm_bound": value})


def test_a_run_that_began_before_the_bound_was_automatic_has_the_same_text() -> None:
    assert "norm-bound" not in files.effective(RunConfig())
    assert 'norm-bound = "off"' in files.effective(RunConfig(norm_bound="off"))


@pytest.mark.usefixtures("masked")
def test_under_masks_the_automatic_bound_is_off_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert components.aggregator_of(RunConfig()).screens == ()
    assert "--norm-bound auto is off: with --secure-aggregation the server sees no single upload" in caplog.text


@pytest.mark.usefixtures("masked")
def test_under_masks_a_number_is_refused_before_the_run_starts() -> None:
    opening = run.open_run(RunConfig(norm_bound=3.0), watchers=())
    with pytest.raises(UsageError, match=r"--norm-bound 3\.0 with --secure-aggregation"), opening:
        pass
