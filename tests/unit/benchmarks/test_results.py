"""Results are written for people and for programs."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import plots, results
from benchmarks.results import Figures, Outcome

SVG = "{http://www.w3.org/2000/svg}"


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


def test_bars_are_as_long_as_their_ratios() -> None:
    root = ElementTree.fromstring(plots.chart("pilot", {"FedShelf": 0.9, "limit": 1.0, "<peer>": 1.8}))
    bars = {bar.get("class"): float(bar.get("width", "0")) for bar in root.iter(f"{SVG}rect")}
    assert bars["peer"] / bars["fedshelf"] == pytest.approx(2.0, abs=0.01)
    assert bars["limit"] / bars["fedshelf"] == pytest.approx(1 / 0.9, abs=0.01)
    assert {"FedShelf", "limit", "<peer>", "0.90", "1.80"} <= {text.text for text in root.iter(f"{SVG}text")}


def test_ratios_far_apart_are_dots_on_a_logarithmic_scale() -> None:
    root = ElementTree.fromstring(plots.chart("wire", {"limit": 1.0, "FedShelf": 10.0, "peer": 100.0}))
    places = [float(dot.get("cx", "0")) for dot in root.iter(f"{SVG}circle")]
    assert places[2] - places[1] == pytest.approx(places[1] - places[0], abs=0.2)
    assert all(float(bar.get("height", "0")) == 2 for bar in root.iter(f"{SVG}rect"))


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
