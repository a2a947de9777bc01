"""What a run has brought each store, in figures and in one sentence; in the database, on the console, in `runs
show`."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedshelf.cli.runs import app
from fedshelf.core.choices import Candidate
from fedshelf.core.events import ComparisonReceived, ComparisonStarted, RunStarted, StoreComparison, StoresCompared
from fedshelf.reporting import gain_report as worth
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.tracking.console import ConsoleSink
from fedshelf.tracking.database import RunDatabase
from fedshelf.tracking.queries import run_summary

LOCAL, GLOBAL, PERSONALIZED = Candidate.LOCAL, Candidate.GLOBAL, Candidate.PERSONALIZED


def outcome(
    client: str, best: Candidate, accuracies: Mapping[Candidate, float], *, on_test: bool = True
) -> StoreComparison:  # fmt: skip
    return StoreComparison(client=client, best=best, accuracies=accuracies, on_test=on_test)


LYON = outcome("lyon", PERSONALIZED, {LOCAL: 0.4, GLOBAL: 0.5, PERSONALIZED: 0.6})
OSLO = outcome("[b]oslo", LOCAL, {LOCAL: 0.5, GLOBAL: 0.3, PERSONALIZED: 0.45})
ROME = StoreComparison(client="rome", best=None, accuracies={}, on_test=False, reason="not connected")
COMPARED = StoresCompared(round=3, stores=(LYON, OSLO, ROME))


def test_the_gain_is_that_of_the_kept_model_over_training_alone() -> None:
    assert worth.gain(LYON) == pytest.approx(0.2)
    assert worth.gain(OSLO) == 0
    assert worth.gain(ROME) is None
    assert worth.gain(outcome("x", PERSONALIZED, {PERSONALIZED: 0.5})) is None
    assert (worth.points(0.2), worth.points(-0.014), worth.points(0.0), worth.points(None)) == (
        "+20.0", "-1.4", "+0.0", "–"
    )  # fmt: skip


def test_the_verdict_counts_stores_that_gained_and_gives_the_means() -> None:
    sentence = worth.verdict(COMPARED.stores)
    assert sentence.startswith("worth it for 1 of 2 stores")
    assert "55.0 % right (mean, on test photos)" in sentence
    assert "names 45.0 %: +10.0 points" in sentence


def test_a_verdict_on_the_photos_that_the_choice_was_made_on_says_so() -> None:
    assert "which flatter it" in worth.verdict([outcome("x", GLOBAL, {LOCAL: 0.2, GLOBAL: 0.4}, on_test=False)])


def test_where_no_store_can_tell_there_is_no_verdict() -> None:
    assert worth.verdict([ROME]) == ""
    assert worth.verdict([]) == ""


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory.create(tmp_path / "r1", run_id="r1", config_toml="", config_digest="d")
    started = RunStarted(
        run_id="r1", num_rounds=3, first_round=1, num_parameters=9, num_classes=3, min_clients=1
    )  # fmt: skip
    database = RunDatabase(directory.database)
    for event in (started, StoresCompared(round=2, stores=(OSLO,)), COMPARED, COMPARED):
        database.emit(event)
    database.close()
    return directory


def test_the_newest_comparison_is_what_the_database_tells(run: RunDirectory) -> None:
    stores = {store.client: store for store in run_summary(run.path).stores}
    assert sorted(stores) == ["[b]oslo", "lyon", "rome"]
    assert (stores["lyon"].best, stores["lyon"].accuracies) == (PERSONALIZED, LYON.accuracies)
    assert (stores["lyon"].on_test, stores["rome"].best, stores["rome"].reason) == (True, None, "not connected")


def test_runs_show_has_a_row_for_every_store_the_mean_and_the_verdict(run: RunDirectory) -> None:
    text = CliRunner().invoke(app, ["show", str(run.path)], catch_exceptions=False).stdout
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if "%" in line or "rome" in line}
    assert rows["lyon"] == ["40.0", "%", "50.0", "%", "60.0", "%", "+20.0", "personalized"]
    assert rows["[b]oslo"][-2:] == ["+0.0", "local"]
    assert rows["rome"] == ["–", "–", "–", "–", "nothing"]
    assert "\n    not connected\n" in text
    assert rows["mean"] == ["of", "3", "stores", "45.0", "%", "40.0", "%", "52.5", "%", "+10.0"]
    assert worth.verdict(COMPARED.stores) in text


def test_runs_show_json_has_the_stores_by_the_contract(run: RunDirectory) -> None:
    text = CliRunner().invoke(app, ["show", str(run.path), "--json"], catch_exceptions=False).stdout
    lyon = next(store for store in json.loads(text)["stores"] if store["client"] == "lyon")
    assert lyon == {"client": "lyon", "local": 0.4, "global": 0.5, "personalized": 0.6, "best": "personalized"}
    rome = next(store for store in json.loads(text)["stores"] if store["client"] == "rome")
    assert rome == {"client": "rome", "local": None, "global": None, "personalized": None, "best": None}


def test_the_console_names_what_each_store_keeps_and_says_whether_it_was_worth_it() -> None:
    console = Console(width=300, force_terminal=False, record=True)
    sink = ConsoleSink(console)
    sink.emit(ComparisonStarted(round=3, stores=("lyon", "[b]oslo", "rome")))
    sink.emit(ComparisonReceived(round=3, client="lyon", reason="", num_done=1, num_stores=3))
    sink.emit(COMPARED)
    text = console.export_text()
    assert "3 stores now compare models" in text
    assert "lyon keeps the personalized model (local 40.0 %, global 50.0 %, personalized 60.0 %)" in text
    assert "[b]oslo keeps the local model" in text
    assert "warning: rome has compared no models: not connected" in text
    assert worth.verdict(COMPARED.stores) in text
