"""Figures as text."""

import pytest

from fedshelf.reporting.formatting import duration, number, percent, size, sparkline


def test_absent_figures_are_dashes() -> None:
    assert [percent(None), number(None), size(None), duration(None)] == ["–"] * 4


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_999, "1.0 MB"), (5.3e9, "5.3 GB")]
)
def test_sizes_have_the_unit_that_fits(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.21, "4.2 s"), (59.97, "1 min 0 s"), (725, "12 min 5 s"), (12000, "3 h 20 min")]
)
def test_times_have_the_units_that_fit(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_sparkline_goes_from_least_to_greatest_with_blanks_for_gaps() -> None:
    assert sparkline([0.1, None, 0.2, 0.8]) == "▁ ▂█"
    assert sparkline([0.5, 0.5]) == "▁▁"
    assert sparkline([None]) == sparkline([]) == ""


def test_a_long_sparkline_is_thinned_out_and_ends_with_the_last_value() -> None:
    line = sparkline([0.0] * 999 + [1.0], width=10)
    assert line == "▁" * 9 + "█"
