"""Results are written for people and for programs."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from benchmarks import plots, results
from benchmarks.results import Figures, Outcome


def figures(ratio: float) -> Figures:
    return Figures(seconds=10 * ratio, ratio=ratio, round_seconds=ratio, cpu_seconds=1.23456, peak_mb=100.0)


def test_writing_a_section_replaces_it_and_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "PATH", tmp_path / "RESULTS.md")
    results.write("pilot", "first", "command")
    results.write("chain", "other", "command")
    results.write("pilot", "second", "command")
    text = results.PATH.read_text(encoding="utf-8")
    assert "first" not in text
    assert text.index("second") < text.index("other")
    assert text.count("## pilot\n") == 1


def test_records_add_up_and_the_newest_is_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RECORDS", tmp_path / "results.json")
    for ratio in (1.5, 1.25):
        outcome = Outcome(summary={}, text="", figures={"FedShelf": figures(ratio)}, failed={"pfl": "no wheel"})
        results.record("pilot", outcome)
    records = results.load()["pilot"]
    assert [record["figures"]["FedShelf"]["ratio"] for record in records] == [1.5, 1.25]
    assert records[0]["figures"]["FedShelf"]["cpu_seconds"] == 1.235
    assert records[0]["failed"] == {"pfl": "no wheel"}
    assert records[0]["machine"] == results.machine()


def test_the_summary_has_the_keys_that_scripts_rely_on() -> None:
    summary = figures(1.25).summary(figures(1.0))
    assert json.loads(json.dumps(summary)) == {"ours": 12.5, "limit": 10.0, "ratio": 1.25, "peak_mb": 100}


def test_bars_are_as_long_as_their_ratios_and_the_smallest_is_on_top() -> None:
    (axes,) = plots.bar_chart("pilot", {"FedShelf": 0.9, "limit": 1.0, "peer": 1.8}).axes
    assert [bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle)] == [1.8, 1.0, 0.9]  # from the bottom
    assert [label.get_text() for label in axes.get_yticklabels()] == ["peer", "limit", "FedShelf"]
    assert {text.get_text() for text in axes.texts} == {"0.90", "1.00", "1.80"}


def test_ratios_far_apart_are_dots_on_a_logarithmic_scale() -> None:
    (axes,) = plots.bar_chart("wire", {"limit": 1.0, "FedShelf": 10.0, "peer": 100.0}).axes
    assert (axes.get_xscale(), list(axes.patches)) == ("log", [])
    assert np.asarray(axes.collections[0].get_offsets())[:, 0].tolist() == [100.0, 10.0, 1.0]


def test_each_size_gets_a_chart_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "FOLDER", tmp_path / "plots")
    found = {f"{name}, {size} MB": figures(2.0) for size in (10, 100) for name in ("FedShelf", "limit")}
    images = plots.draw_bars("wire, without TLS", found)
    assert [path.name for path in sorted(plots.FOLDER.iterdir())] == [
        "wire-without-tls-10-mb.svg",
        "wire-without-tls-100-mb.svg",
    ]
    assert images[0].endswith("(plots/wire-without-tls-10-mb.svg)")
    assert "FedShelf 2.00" in images[0]
