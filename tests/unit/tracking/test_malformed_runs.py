"""A folder in `runs/` that is no run, or a damaged one, hides none of the others and keeps no run from starting."""

import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from fedshelf.core.errors import RunError
from fedshelf.core.events import RunEnded, RunStarted, RunStatus
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.tracking.database import RunDatabase
from fedshelf.tracking.queries import run_summary
from fedshelf.tracking.runs import find_resumable, find_runs, resolve_run
from tests.unit.cli.screen import run as fedshelf
from tests.unit.data.samples import write_pack
from tests.users import ordinary_user

ROOT = Path("runs")
TINY = ["--image-size", "16", "--width", "8", "--batch-size", "4", "--device", "cpu", "--rounds", "1"]


def make(name: str, *, status: RunStatus | None = None, digest: str = "d") -> RunDirectory:
    run = RunDirectory.create(ROOT / name, run_id=name, config_toml="rounds = 3\n", config_digest=digest)
    database = RunDatabase(run.database)
    database.emit(RunStarted(run_id=name, num_rounds=3, first_round=1, num_parameters=9, num_classes=2, min_clients=1))
    if status:
        database.emit(RunEnded(status=status))
    database.close()
    return run


def identity(name: str, content: str | bytes) -> None:
    (ROOT / name).mkdir()
    (ROOT / name / "run.json").write_bytes(content.encode() if isinstance(content, str) else content)


def pipe(name: str) -> None:
    (ROOT / name).mkdir()
    os.mkfifo(ROOT / name / "run.json")


def valid(**changes: object) -> str:
    return json.dumps({"schema": 1, "run_id": "x", "config_digest": "d", "created": "2026", **changes})


def junk_database(name: str) -> None:
    make(name).database.write_bytes(b"junk" * 1000)


def database_folder(name: str) -> None:
    database = make(name).database
    database.unlink()
    database.mkdir()


def foreign_database(name: str) -> None:
    """SQLite, but with other content than FedShelf writes."""
    with sqlite3.connect(make(name).database) as connection:
        connection.execute("UPDATE run SET status = 'confused'")
    connection.close()


def other_tables(name: str) -> None:
    make(name).database.unlink()
    with sqlite3.connect(ROOT / name / "run.db") as connection:
        connection.execute("CREATE TABLE run (a, b)")
        connection.execute("INSERT INTO run VALUES (1, 2)")
    connection.close()


def newer_database(name: str) -> None:
    with sqlite3.connect(make(name).database) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()


DAMAGED: dict[str, Callable[[str], object]] = {
    "junk-db": junk_database,
    "foreign-db": foreign_database,
    "other-tables": other_tables,
    "newer-db": newer_database,
    "newer-run": lambda name: identity(name, valid(schema=99)),
    "no-json": lambda name: identity(name, "{"),
    "deep-json": lambda name: identity(name, "[" * 60_000),
    "list-json": lambda name: identity(name, "[]"),
    "numbers": lambda name: identity(name, valid(run_id=1, created=[])),
    "not-utf8": lambda name: identity(name, b"\xff\xfe\x00" * 9),
    "loop": lambda name: (ROOT / name).symlink_to(name),
}
HARMLESS: dict[str, Callable[[str], object]] = {
    "a-file": lambda name: (ROOT / name).write_text("hello"),
    "no-run": lambda name: (ROOT / name).mkdir(),
    "dead-link": lambda name: (ROOT / name).symlink_to("/nowhere"),
    "pipe": pipe,
    "folder-json": lambda name: (ROOT / name / "run.json").mkdir(parents=True),
}


@pytest.fixture
def damaged(home: Path) -> list[str]:
    """A good, unfinished run among all kinds of other things in `runs/`; the names of the damaged runs."""
    make("good", status=RunStatus.STOPPED)
    for name, break_it in (DAMAGED | HARMLESS).items():
        break_it(name)
    make("no-db").database.unlink()
    return sorted(DAMAGED)


def test_list_and_show_skip_what_is_damaged_and_name_it(damaged: list[str], caplog: pytest.LogCaptureFixture) -> None:
    code, text = fedshelf("runs", "list", "--json")
    assert code == 0
    listed = json.loads(text)
    assert {run["run_id"]: run["status"] for run in listed} == {"good": "stopped", "no-db": "stopped"}
    warned = [record.getMessage() for record in caplog.records]
    assert [name for name in damaged if not any(f"skipping 'runs/{name}'" in line for line in warned)] == []
    assert [name for name in HARMLESS if any(f"'runs/{name}'" in line for line in warned)] == []
    for arguments in (("list",), ("show", "good"), ("show", "no-db"), ("stop", "good")):
        code, text = fedshelf("runs", *arguments)
        assert code == 0, text


@pytest.mark.parametrize("name", sorted(DAMAGED))
def test_showing_a_damaged_run_says_what_is_wrong(damaged: list[str], name: str) -> None:
    code, text = fedshelf("runs", "show", str(ROOT / name))
    assert code in (1, 2)
    assert text.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in text
    assert name in text


def test_a_database_that_is_a_folder_counts_as_none(home: Path) -> None:
    make("good")
    database_folder("folder-db")
    assert run_summary(ROOT / "folder-db").rounds == ()


def test_the_run_to_resume_is_found_among_damaged_ones_of_its_configuration(damaged: list[str]) -> None:
    (ROOT / "no-db" / "run.json").unlink()
    found = find_resumable(ROOT, lambda run: run.config_digest == "d")
    assert found is not None
    assert found.run_id == "good"


def test_a_run_starts_and_predicts_next_to_damaged_ones(damaged: list[str]) -> None:
    for store in ("lyon", "oslo"):
        write_pack(Path("stores") / store, {"apple": 4, "milk": 4})
    photo = next(Path("stores").rglob("*.png"))
    for _ in range(2):
        before = {path.name for path in ROOT.iterdir()}
        code, text = fedshelf("simulate", "--data-dir", "stores", *TINY)
        assert code == 0, text
        (new,) = {path.name for path in ROOT.iterdir()} - before
        code, text = fedshelf("predict", str(photo), "--run", new)
        assert code == 0, text
        (ROOT / new / "run.db").write_bytes(b"junk" * 100)  # of the configuration that starts next


def test_a_folder_that_this_user_cannot_read_is_skipped_and_named(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    make("good")
    make("closed")
    for path in (Path(), ROOT, *(ROOT / "good").rglob("*"), ROOT / "good"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (ROOT / "closed").chmod(0)
    with ordinary_user():
        assert [run.run_id for run in find_runs(ROOT)] == ["good"]
        assert "skipping 'runs/closed'" in caplog.text
        with pytest.raises(RunError, match="'runs/closed' cannot be read: permission denied"):
            resolve_run("runs/closed", ROOT)
    (ROOT / "closed").chmod(0o755)


def test_a_folder_of_runs_that_cannot_be_read_is_told(home: Path) -> None:
    make("good")
    Path().chmod(0o755)
    ROOT.chmod(0)
    with ordinary_user(), pytest.raises(RunError, match="cannot read 'runs'"):
        find_runs(ROOT)
    ROOT.chmod(0o755)
