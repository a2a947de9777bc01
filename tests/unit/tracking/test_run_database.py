"""The run database and the JSON that scripts rely on."""

import json
import math
import resource
import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from fedshelf.core.errors import RunError
from fedshelf.core.events import (
    ClientJoined,
    ClientStatus,
    Event,
    NoiseReported,
    Participation,
    RoundFinished,
    RoundStarted,
    RoundVoid,
    RunEnded,
    RunStarted,
    RunStatus,
    UploadReceived,
)
from fedshelf.serialization import records
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.tracking.database import RunDatabase
from fedshelf.tracking.product_results import NO_RESULTS
from fedshelf.tracking.queries import EMPTY, MISSING, UNEXPLAINED, run_summary

STARTED = RunStarted(run_id="r1", num_rounds=3, first_round=1, num_parameters=318, num_classes=81, min_clients=2)
LYON = Participation(
    client="lyon", status=ClientStatus.COUNTED, num_examples=40, train_loss=1.5, accuracy=0.5, seconds=2.0
)
OSLO = Participation(client="oslo", status=ClientStatus.OFFLINE, reason="silent for 30 s")


def finished(
    round: int, *, attempt: int = 1, accuracy: float | None = 0.5, clients: tuple[Participation, ...] = (OSLO, LYON)
) -> RoundFinished:
    return RoundFinished(
        round=round,
        attempt=attempt,
        clients=clients,
        train_loss=1.25,
        accuracy=accuracy,
        central_accuracy=None,
        central_loss=None,
        seconds=4.5,
        bytes_up=1000,
        bytes_down=2000,
        best_round=1,
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "r1", run_id="r1", config_toml="", config_digest="d")


def write_rounds(database: RunDatabase, rounds: Iterable[int]) -> None:
    for round_ in rounds:
        database.emit(finished(round_))


def write(run: RunDirectory, *events: Event) -> None:
    database = RunDatabase(run.database)
    for event in events:
        database.emit(event)
    database.close()


def test_a_run_reads_as_the_contract_says(run: RunDirectory) -> None:
    void = RoundVoid(round=2, attempt=1, reason="1 of 2 answered", clients=(OSLO,))
    ended = RunEnded(status=RunStatus.FINISHED, reason="all 2 rounds are done")
    write(run, STARTED, finished(1), void, finished(2, attempt=2, clients=(LYON,)), ended)
    unknown = {"staleness": None, "batch_size": None, "client_lr": None}
    lyon = {"client": "lyon", "status": "counted", "reason": "", "num_examples": 40, "accuracy": 0.5, **unknown}
    oslo = {
        "client": "oslo",
        "status": "offline",
        "reason": "silent for 30 s",
        "num_examples": None,
        "accuracy": None,
        **unknown,
    }
    figures = {
        "train_loss": 1.25,
        "accuracy": 0.5,
        "central_accuracy": None,
        "seconds": 4.5,
        "virtual_seconds": None,
        "bytes_up": 1000,
        "bytes_down": 2000,
    }
    assert run_summary(run.path).to_record() == {
        "run_id": "r1",
        "status": "finished",
        "reason": "all 2 rounds are done",
        "rounds": [{"round": 1, **figures, "clients": [lyon, oslo]}, {"round": 2, **figures, "clients": [lyon]}],
        "best_round": 1,
        "num_parameters": 318,
        "void_rounds": 1,
        "void_attempts": [{"round": 2, "attempt": 1, "reason": "1 of 2 answered", "clients": [oslo]}],
        "stores": [],
        "refused": [],
        **NO_RESULTS.to_record(),
    }


def test_a_run_without_a_database_or_a_round_reads_as_empty(run: RunDirectory) -> None:
    nothing: dict[str, Any] = {
        "run_id": "r1", "status": "stopped", "reason": "before its first round", "rounds": [], "best_round": None,
        "num_parameters": None, "void_rounds": 0, "void_attempts": [], "stores": [], "refused": [],
        **NO_RESULTS.to_record(),
    }  # fmt: skip
    assert run_summary(run.path).to_record() == nothing
    run.database.touch()  # as a process killed in its first moment leaves it
    assert run_summary(run.path).to_record() == nothing
    write(run)
    assert run_summary(run.path).to_record() == nothing
    with run.lock():
        assert run_summary(run.path).status is RunStatus.RUNNING


def test_a_run_that_lost_its_database_says_so(run: RunDirectory) -> None:
    run.checkpoints.mkdir()
    (run.checkpoints / "round-000002.safetensors").touch()
    summary = run_summary(run.path)
    assert (summary.status, summary.reason) == (RunStatus.STOPPED, MISSING)
    write(run)  # a new one, before anything is in it
    assert run_summary(run.path).reason == EMPTY
    run.database.write_bytes(b"")
    assert run_summary(run.path).reason == EMPTY
    write(run, STARTED, finished(3))
    assert run_summary(run.path).reason == UNEXPLAINED


def test_a_run_whose_process_died_reads_as_stopped(run: RunDirectory) -> None:
    with run.lock():
        write(run, STARTED)
        summary = run_summary(run.path)
        assert (summary.status, summary.reason) == (RunStatus.RUNNING, "")
    summary = run_summary(run.path)
    assert (summary.status, summary.reason) == (RunStatus.STOPPED, UNEXPLAINED)


def test_a_round_repeated_after_a_crash_replaces_the_first(run: RunDirectory) -> None:
    write(run, STARTED, finished(1), finished(2, accuracy=0.25))
    resumed = RunStarted(run_id="r1", num_rounds=5, first_round=2, num_parameters=318, num_classes=81, min_clients=2)
    write(run, resumed)
    assert [round_.round for round_ in run_summary(run.path).rounds] == [1, 2]  # nothing is lost meanwhile
    write(run, finished(2, accuracy=0.75, clients=(LYON,)), finished(2, accuracy=0.75, clients=(LYON,)))
    summary = run_summary(run.path)
    assert [(round_.round, round_.accuracy) for round_ in summary.rounds] == [(1, 0.5), (2, 0.75)]
    assert [client.client for client in summary.rounds[1].clients] == ["lyon"]
    assert summary.num_rounds == 5


def test_a_void_attempt_reported_twice_counts_once(run: RunDirectory) -> None:
    void = RoundVoid(round=1, attempt=1, reason="nobody", clients=(OSLO,))
    write(run, STARTED, void, void)
    write(run, void, finished(1, attempt=2))
    summary = run_summary(run.path)
    assert len(summary.voids) == 1
    assert len(summary.rounds[0].clients) == 2


def test_a_round_that_went_void_when_it_was_repeated_is_not_finished(run: RunDirectory) -> None:
    write(run, STARTED, finished(1), RoundVoid(round=1, attempt=1, reason="nobody", clients=(OSLO,)))
    assert run_summary(run.path).rounds == ()


def test_no_number_that_json_does_not_know_gets_in_or_out(run: RunDirectory) -> None:
    bad = Participation(client="x", status=ClientStatus.COUNTED, accuracy=math.nan, train_loss=math.inf)
    write(run, STARTED, finished(1, accuracy=math.inf, clients=(bad,)))
    text = records.dump(run_summary(run.path).to_record())
    record = json.loads(text, parse_constant=pytest.fail)
    assert record["rounds"][0]["accuracy"] is None
    assert record["rounds"][0]["clients"][0]["accuracy"] is None
    json.loads(records.to_json(finished(1, accuracy=math.nan, clients=(bad,))), parse_constant=pytest.fail)


def test_readers_see_finished_rounds_while_the_writer_is_open(run: RunDirectory) -> None:
    database = RunDatabase(run.database)
    database.emit(STARTED)
    for round_ in (1, 2):
        database.emit(finished(round_))
        assert len(run_summary(run.path).rounds) == round_
    database.close()


def test_a_reader_in_the_middle_of_a_transaction_does_not_hold_up_the_writer(run: RunDirectory) -> None:
    database = RunDatabase(run.database)
    database.emit(STARTED)
    reader = sqlite3.connect(run.database, isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM rounds").fetchone() == (0,)
    database.emit(finished(1))
    assert reader.execute("SELECT count(*) FROM rounds").fetchone() == (0,)
    database.close()
    reader.close()
    assert len(run_summary(run.path).rounds) == 1


def test_a_closed_database_is_one_file_that_can_be_copied(run: RunDirectory, tmp_path: Path) -> None:
    write(run, STARTED, finished(1))
    assert list(run.path.glob("run.db*")) == [run.database]
    copy = sqlite3.connect(f"file:{run.database}?mode=ro&immutable=1", uri=True)
    assert copy.execute("SELECT count(*) FROM rounds").fetchone() == (1,)
    copy.close()


def test_every_event_is_kept_in_order_from_any_thread(run: RunDirectory) -> None:
    database = RunDatabase(run.database)
    events: list[Event] = [
        ClientJoined(client="lyon", num_train=1, num_validation=1, num_left_out=0),
        RoundStarted(round=1, attempt=1, cohort=("lyon",)),
        UploadReceived(round=1, client="lyon", status=ClientStatus.REFUSED, reason="NaN", num_done=1, num_cohort=1),
    ]
    for event in events:
        thread = threading.Thread(target=database.emit, args=(event,))
        thread.start()
        thread.join()
    database.close()
    connection = sqlite3.connect(run.database)
    rows = connection.execute("SELECT kind, record FROM events ORDER BY id").fetchall()
    connection.close()
    assert [kind for kind, _ in rows] == ["client_joined", "round_started", "upload_received"]
    assert json.loads(rows[2][1]) == {
        "event": "upload_received",
        "round": 1,
        "client": "lyon",
        "status": "refused",
        "reason": "NaN",
        "num_done": 1,
        "num_cohort": 1,
        "num_bytes": 0,
        "digest": "",
        "norm": None,
    }


def test_a_full_disk_is_an_error_that_says_what_to_do_and_costs_no_finished_round(run: RunDirectory) -> None:
    database = RunDatabase(run.database)
    database.emit(STARTED)
    database.emit(finished(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, hard))
    try:
        with pytest.raises(RunError, match="disk has space"):
            write_rounds(database, range(2, 200))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    database.close()
    assert run_summary(run.path).rounds[0].accuracy == 0.5
    write(run, finished(300))
    assert run_summary(run.path).rounds[-1].round == 300


def test_a_newer_or_foreign_database_is_refused_by_writer_and_reader(run: RunDirectory) -> None:
    connection = sqlite3.connect(run.database)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(RunError, match="newer FedShelf"):
        RunDatabase(run.database)
    with pytest.raises(RunError, match="newer FedShelf"):
        run_summary(run.path)
    run.database.write_bytes(b"no database at all" * 100)
    with pytest.raises(RunError, match="not a database"):
        RunDatabase(run.database)
    with pytest.raises(RunError, match="not a database"):
        run_summary(run.path)


def test_of_several_noises_of_a_store_the_one_that_protects_least_stands(run: RunDirectory) -> None:
    """A store that gets more photos, or a new ledger, adds other noise from then on."""
    little = NoiseReported(client="lyon", noise_multiplier=0.5, sampling_rate=0.1, steps=10)
    write(run, STARTED, little, NoiseReported(client="lyon", noise_multiplier=2.0, sampling_rate=0.05, steps=10))
    assert run_summary(run.path).noise == {"lyon": little}
