"""`fedshelf runs` as a person and a script see it."""

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedshelf.cli.runs import app
from fedshelf.core.class_folder import ProductCount
from fedshelf.core.errors import RunError, UsageError
from fedshelf.core.events import (
    ClientStatus,
    Participation,
    ProductReport,
    RoundFinished,
    RoundVoid,
    RunEnded,
    RunStarted,
    RunStatus,
)
from fedshelf.data.catalogue import Catalogue
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.tracking.database import RunDatabase


def make_run(root: Path, run_id: str, *, lr: float, accuracies: list[float]) -> RunDirectory:
    config = f'seed = 0\n[training]\nclient_lr = {lr}\nmodel = "resnet10"\n'
    run = RunDirectory.create(root / run_id, run_id=run_id, config_toml=config, config_digest=f"{lr}")
    database = RunDatabase(run.database, now=lambda: 1_795_250_112.0)
    database.emit(
        RunStarted(run_id=run_id, num_rounds=4, first_round=1, num_parameters=318_000, num_classes=81, min_clients=1)
    )
    late = Participation(client="[b]oslo", status=ClientStatus.LATE, reason="after the deadline")
    database.emit(RoundVoid(round=1, attempt=1, reason="0 of 2 answered", clients=(late,)))
    for number, accuracy in enumerate(accuracies, start=1):
        lyon = Participation(client="lyon", status=ClientStatus.COUNTED, num_examples=4, accuracy=accuracy)
        database.emit(
            RoundFinished(
                round=number, attempt=2, clients=(lyon, late), train_loss=2.0 / number, accuracy=accuracy,
                central_accuracy=None, central_loss=None, seconds=2.0, bytes_up=1_300_000, bytes_down=2_600_000,
                best_round=1 + accuracies.index(max(accuracies[:number])),
            )
        )  # fmt: skip
    database.emit(RunEnded(status=RunStatus.FINISHED))
    database.close()
    return run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    make_run(root, "20261121-083512-a1b2", lr=0.1, accuracies=[0.2, 0.6, 0.5])
    make_run(root, "20261121-091200-c3d4", lr=0.05, accuracies=[0.1, 0.3])
    return root


def output(*arguments: str) -> str:
    return CliRunner().invoke(app, arguments, catch_exceptions=False).stdout


def test_show_says_what_the_accuracies_are_of(tmp_path: Path) -> None:
    run = make_run(tmp_path, "20261121-100000-e5f6", lr=0.1, accuracies=[1.0])
    assert "test photos" not in output("show", str(run.path))
    database = RunDatabase(run.database)
    database.emit(
        RunStarted(
            run_id="20261121-100000-e5f6", num_rounds=1, first_round=1, num_parameters=1, num_classes=1, min_clients=1,
            num_test=3, num_test_left_out=6,
        )
    )  # fmt: skip
    database.close()
    text = " ".join(output("show", str(run.path)).split())
    assert "there is one product in all stores" in text
    assert "the central accuracy is of 3 of 9 test photos" in text


def test_list_names_the_newest_first(root: Path) -> None:
    text = output("list", "--root", str(root))
    assert text.index("20261121-091200-c3d4") < text.index("20261121-083512-a1b2")
    assert "50.0 %" in text
    listed = json.loads(output("list", "--root", str(root), "--json"))
    assert [run["run_id"] for run in listed] == ["20261121-091200-c3d4", "20261121-083512-a1b2"]
    assert (listed[1]["rounds"], listed[1]["num_rounds"], listed[1]["accuracy"]) == (3, 4, 0.5)
    assert listed[1]["started"] == "2026-11-21T08:35:12Z"


def test_a_run_whose_database_is_missing_says_so_in_list_and_show(root: Path) -> None:
    run = RunDirectory.open(root / "20261121-083512-a1b2")
    run.checkpoints.mkdir()
    (run.checkpoints / "round-000003.safetensors").touch()
    run.database.unlink()
    said = "its database run.db is missing, though it has checkpoints: restore run.db from a copy"
    for command in (["list"], ["show", run.run_id]):
        assert said in " ".join(output(*command, "--root", str(root)).split())


def test_a_configuration_that_is_no_toml_is_named_by_its_path(root: Path) -> None:
    run = RunDirectory.open(root / "20261121-083512-a1b2")
    run.config.write_text("rounds = ")
    with pytest.raises(RunError, match=rf"^'{run.config}' is not valid TOML: .*Restore it from a copy"):
        _ = run.config_toml


def test_list_of_no_runs_says_how_to_start_one(tmp_path: Path) -> None:
    assert "fedshelf simulate" in output("list", "--root", str(tmp_path))
    assert json.loads(output("list", "--root", str(tmp_path), "--json")) == []


def test_show_prints_every_round_and_who_was_missing_and_why(root: Path) -> None:
    text = output("show", "20261121-08", "--root", str(root))
    assert "run 20261121-083512-a1b2: finished" in text
    assert "2*" in text
    assert text.count("\n    [b]oslo late: after the deadline\n") == 3
    assert "round 1, attempt 2 was void: 0 of 2 answered ([b]oslo late: after the deadline)" in text
    assert "2.6 MB" in text


def test_show_prints_the_contract_for_scripts(root: Path) -> None:
    record = json.loads(output("show", str(root / "20261121-083512-a1b2"), "--json"))
    assert list(record) == [
        "run_id", "status", "reason", "rounds", "best_round", "num_parameters", "void_rounds", "void_attempts",
        "stores", "refused", "products", "products_on", "levels", "levels_on", "confusion", "privacy",
        "protections", "codec_up", "teacher",
    ]  # fmt: skip
    assert list(record["void_attempts"][0]) == ["round", "attempt", "reason", "clients"]
    assert list(record["void_attempts"][0]["clients"][0]) == list(record["rounds"][0]["clients"][0])
    assert list(record["rounds"][0]) == [
        "round", "train_loss", "accuracy", "central_accuracy", "seconds", "virtual_seconds", "bytes_up", "bytes_down",
        "clients",
    ]  # fmt: skip
    assert list(record["rounds"][0]["clients"][0]) == [
        "client", "status", "reason", "num_examples", "accuracy", "staleness", "batch_size", "client_lr",
    ]  # fmt: skip
    assert (record["best_round"], record["void_rounds"]) == (2, 1)


def test_show_names_those_who_trained_with_a_batch_size_of_their_own(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", run_id="run", config_toml="batch-size = 16\n", config_digest="")
    database = RunDatabase(run.database)
    own = {"lyon": (64, 0.2), "[b]oslo": (16, 0.05), "nice": (64, 0.2), **{f"s{i}": (32, 0.1) for i in range(10)}}
    clients = [
        Participation(client=name, status=ClientStatus.COUNTED, batch_size=size, client_lr=rate)
        for name, (size, rate) in own.items()
    ]
    clients.append(Participation(client="away", status=ClientStatus.OFFLINE))
    for number in (1, 2):
        database.emit(
            RoundFinished(
                round=number, attempt=0, clients=tuple(clients[number - 1 :]), train_loss=None, accuracy=None,
                central_accuracy=None, central_loss=None, seconds=2.0, bytes_up=1, bytes_down=1, best_round=None,
            )
        )  # fmt: skip
    database.close()
    text = output("show", str(run.path))
    assert "round 2: batches of 32 (configured: 16) at the rate 0.1: 's0', 's1', 's2', 's3', 's4' and 5 more" in text
    assert "round 2: batches of 64 (configured: 16) at the rate 0.2: 'nice'" in text
    assert text.count("batches of") == 2, "the last round tells; who trains as configured is not named"
    record = json.loads(output("show", str(run.path), "--json"))
    by_name = {client["client"]: client for client in record["rounds"][0]["clients"]}
    assert [by_name["lyon"][key] for key in ("batch_size", "client_lr")] == [64, 0.2]
    assert [by_name["away"][key] for key in ("batch_size", "client_lr")] == [None, None]


def test_compare_sets_figures_and_differing_settings_side_by_side(root: Path) -> None:
    text = output("compare", "20261121-08", "20261121-09", "--root", str(root))
    assert "60.0 %" in text
    assert "training.client_lr" in text
    assert "seed" not in text
    record = json.loads(output("compare", "20261121-08", "20261121-09", "--root", str(root), "--json"))
    assert record["settings"] == {"training.client_lr": [0.1, 0.05]}
    assert [run["values"] for run in record["runs"]] == [[0.2, 0.6, 0.5], [0.1, 0.3]]


def test_compare_by_loss_calls_the_least_the_best(root: Path) -> None:
    text = output("compare", "20261121-08", "20261121-09", "--root", str(root), "--metric", "train_loss")
    (best,) = [line.split() for line in text.splitlines() if line.startswith("best ")]
    assert best[-2:] == ["0.667", "1.000"]


def test_mistakes_are_told_as_mistakes(root: Path) -> None:
    with pytest.raises(UsageError, match="unknown run 'nope'"):
        output("show", "nope", "--root", str(root))
    with pytest.raises(UsageError, match="two or more different runs"):
        output("compare", "20261121-08", "20261121-08", "--root", str(root))
    with pytest.raises(UsageError, match="accuracy, central_accuracy, train_loss"):
        output("compare", "20261121-08", "20261121-09", "--root", str(root), "--metric", "f1")
    with pytest.raises(RunError, match="holds no run"):
        output("show", str(root))


@pytest.mark.parametrize("command", ["list", "show", "compare"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    assert f"Example: fedshelf runs {command}" in output(command, "--help")


def test_looking_at_runs_does_not_load_torch(root: Path) -> None:
    code = (
        "import sys; from fedshelf.cli.runs import app; "
        "app(['list', '--root', sys.argv[1]], standalone_mode=False); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(root)], check=True, stdout=subprocess.DEVNULL)


CATALOGUE = Catalogue(
    ("Gala", "Kiwi", "Milk", "Pink"), (("Fruit/Apple/Gala",), ("Fruit/Kiwi",), ("Dairy/Milk",), ("Fruit/Apple/Pink",))
)
REPORT = ProductReport(
    products=(ProductCount(index=0, correct=3, total=4), ProductCount(index=2, correct=0, total=6)), levels=(5, 4, 3),
    num_photos=10, num_stores=2, num_withheld=1, confusion=((0, 0, 3), (0, 3, 5), (2, 2, 1), (3, 1, 1)),
)  # fmt: skip


def with_report(root: Path, *reports: ProductReport | None, config: str = "", catalogue: Catalogue = CATALOGUE) -> Path:
    """A run whose rounds have these reports."""
    run = RunDirectory.create(root / "run", run_id="run", config_toml=config, config_digest="")
    catalogue.save(run.catalogue)
    with closing(RunDatabase(run.database)) as database:
        database.emit(
            RunStarted(
                run_id="run", num_rounds=len(reports), first_round=1, num_parameters=9, num_classes=len(catalogue),
                min_clients=1,
            )
        )  # fmt: skip
        for number, report in enumerate(reports, start=1):
            database.emit(
                RoundFinished(
                    round=number, attempt=0, clients=(), train_loss=None, accuracy=0.3, central_accuracy=None,
                    central_loss=None, seconds=2.0, bytes_up=1, bytes_down=1, best_round=1, report=report,
                )
            )  # fmt: skip
    return run.path


def test_show_names_the_weakest_products_and_those_most_often_mixed_up(tmp_path: Path) -> None:
    run = with_report(tmp_path, None, REPORT)
    record = json.loads(output("show", str(run), "--json"))
    assert record["products"] == [
        {"product": "Gala", "correct": 3, "total": 4}, {"product": "Milk", "correct": 0, "total": 6},
    ]  # fmt: skip
    assert record["levels"] == [
        {"depth": 1, "accuracy": 1.0},
        {"depth": 2, "accuracy": 0.9},
        {"depth": 3, "accuracy": 0.4},
    ]
    assert (record["products_on"], record["levels_on"]) == ("validation photos", "test photos")
    assert record["confusion"] == [
        {"product": "Gala", "taken_for": "Pink", "photos": 5}, {"product": "Pink", "taken_for": "Kiwi", "photos": 1},
    ]  # fmt: skip
    text = output("show", str(run))
    assert "accuracy by level of folders, on test photos: 1: 100.0 %, 2: 90.0 %, 3: 40.0 %" in text
    assert "weakest of 2 products (2 more have no validation photos), on the validation photos of 2 stores:" in text
    rows = [line.split() for line in text.splitlines()]
    assert rows.index(["Milk", "6", "0", "0.0", "%"]) < rows.index(["Gala", "4", "3", "75.0", "%"])
    assert ["Gala", "Pink", "5"] in rows
    assert "1 store withheld" in text


def test_without_test_photos_levels_are_of_the_stores_and_without_stores_products_are_of_the_test(
    tmp_path: Path,
) -> None:
    untested = json.loads(output("show", str(with_report(tmp_path / "1", replace(REPORT, confusion=()))), "--json"))
    assert [level["accuracy"] for level in untested["levels"]] == [0.5, 0.4, 0.3]
    assert (untested["levels_on"], untested["confusion"]) == ("validation photos", [])
    unreported = ProductReport(confusion=REPORT.confusion)
    tested = json.loads(output("show", str(with_report(tmp_path / "2", unreported)), "--json"))
    assert tested["products_on"] == "test photos"
    assert [(p["product"], p["correct"], p["total"]) for p in tested["products"]] == [
        ("Gala", 3, 8), ("Milk", 1, 1), ("Pink", 0, 1),
    ]  # fmt: skip


def test_of_flat_folders_show_prints_no_levels(tmp_path: Path) -> None:
    flat = Catalogue(CATALOGUE.names, tuple((name,) for name in CATALOGUE.names))
    run = with_report(tmp_path, REPORT, catalogue=flat)
    assert "level" not in output("show", str(run))
    assert json.loads(output("show", str(run), "--json"))["levels"] == [{"depth": 1, "accuracy": 0.4}]


def test_with_personal_tensors_show_says_whose_model_the_results_are_of(tmp_path: Path) -> None:
    run = with_report(tmp_path, REPORT, config='personalize = "fedper"\n')
    assert "on the validation photos of 2 stores, each with its own model:" in output("show", str(run))


def test_results_by_product_are_of_the_last_round_only_and_a_run_of_an_older_version_has_none(tmp_path: Path) -> None:
    extended = json.loads(output("show", str(with_report(tmp_path / "1", REPORT, None)), "--json"))
    assert (extended["products"], extended["levels"]) == ([], [])
    old = with_report(tmp_path / "2", None)
    with closing(sqlite3.connect(old / "run.db")) as connection, connection:
        connection.execute("UPDATE events SET record = json_remove(record, '$.report')")
    assert json.loads(output("show", str(old), "--json"))["products"] == []
