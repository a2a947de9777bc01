"""The guard tells a slower FedShelf, and a slower limit, from noise."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import guard, results
from benchmarks.__main__ import app
from benchmarks.measure import MeasurementError
from benchmarks.results import Figures, Outcome


def record(*, ratio: float = 1.0, limit: float = 10.0, one: float = 12.5, machine: str = "m") -> Mapping[str, Any]:
    seconds = {"FedShelf": ratio * limit, "limit": limit, "one process": one}
    figures = {name: {"seconds": each, "ratio": each / limit} for name, each in seconds.items()}
    return {"date": "2026-01-01", "machine": machine, "figures": figures, "failed": {}}


def bad(benchmark: str, *records: Mapping[str, Any]) -> list[str]:
    return [finding.text for finding in guard.judge(benchmark, records) if finding.bad]


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.19])
def test_a_ratio_within_a_tenth_of_the_last_is_fine(ratio: float) -> None:
    assert bad("pilot", record(ratio=1.09), record(ratio=ratio)) == []


def test_a_ratio_more_than_a_tenth_above_the_last_is_not() -> None:
    (text,) = bad("pilot", record(ratio=1.0), record(ratio=1.11))
    assert "FedShelf takes 1.11 × the limit, 1.00 on 2026-01-01 (+11%)" in text


def test_only_the_record_before_the_last_counts() -> None:
    assert bad("pilot", record(ratio=1.0), record(ratio=1.5), record(ratio=1.5)) == []


def test_a_machine_twice_as_slow_for_both_is_fine() -> None:
    slow = record(ratio=1.0, limit=20.0, one=25.0, machine="slow")
    assert bad("pilot", record(), slow) == []


@pytest.mark.parametrize(
    ("benchmark", "share", "right"),
    [
        ("pilot", 0.82, True), ("pilot", 0.77, True), ("pilot", 0.95, False), ("pilot", 0.6, False),
        ("chain", 0.63, True), ("chain", 0.48, True), ("chain", 0.75, False), ("chain", 0.4, False),
    ],
)  # fmt: skip
def test_two_processes_over_one_process_must_stay_in_their_band(benchmark: str, share: float, right: bool) -> None:
    texts = bad(benchmark, record(limit=10.0, one=10.0 / share))
    assert (texts == []) is right
    assert all(f"two processes take {share:.2f} × one process" in text for text in texts)


def test_a_limit_half_as_slow_again_on_the_same_machine_is_not_fine() -> None:
    slower = record(limit=15.1, one=15.1 / 0.8)
    (text,) = bad("pilot", record(), slower)
    assert "the limit takes 15.1 s, 10 s on 2026-01-01" in text


def test_the_sizes_of_wire_are_judged_one_by_one() -> None:
    def wire(small: float, large: float) -> Mapping[str, Any]:
        ratios = {"FedShelf, 10 MB": small, "FedShelf, 100 MB": large, "Flower SuperLink, 10 MB": 5 * small}
        figures = {name: {"seconds": ratio, "ratio": ratio} for name, ratio in ratios.items()}
        return {"date": "2026-01-01", "machine": "m", "figures": figures, "failed": {}}

    (text,) = bad("wire", wire(5.0, 5.0), wire(5.0, 6.0))
    assert "FedShelf, 100 MB takes 6.00 × the limit" in text


def test_the_exit_code_and_the_text_say_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RECORDS", tmp_path / "results.json")
    with pytest.raises(MeasurementError, match="run `make bench` first"):
        guard.findings()
    for ratio, code in ((1.0, 0), (1.05, 0), (1.4, 1)):
        figures = {
            name: Figures(seconds=seconds, ratio=seconds / 10, round_seconds=1.0, cpu_seconds=1.0, peak_mb=1.0)
            for name, seconds in (("FedShelf", 10 * ratio), ("limit", 10.0), ("one process", 12.5))
        }
        results.record("pilot", Outcome(summary={}, text="", figures=figures))
        judged = CliRunner().invoke(app, ["guard"])
        assert judged.exit_code == code
    assert "BAD  pilot: FedShelf takes 1.40 × the limit, 1.05 on" in judged.output
