"""The run database: what happened in each round, which clients took part, and why others did not.

SQLite with a write-ahead log: readers do not block the single writer, nor it them. Each event, or group of events, is
one short transaction. A power failure may lose the last few events but no finished round, whose transaction is fsynced.

Emit `RoundFinished` *before* the round's checkpoint is saved. After a crash between the two, the round is repeated and
replaces the first record; in the opposite order, it would be missing.
"""

import dataclasses
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fedshelf.core.choices import Candidate
from fedshelf.core.errors import RunError
from fedshelf.core.events import (
    CatalogueChanged,
    Event,
    Participation,
    RoundFinished,
    RoundVoid,
    RunEnded,
    RunStarted,
    RunStatus,
    StoresCompared,
)
from fedshelf.serialization import records
from fedshelf.storage.atomic_files import make_folder, open_private, translating_os_errors

SCHEMA_VERSION = 2

_SCHEMA = """
CREATE TABLE run (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    run_id TEXT NOT NULL, status TEXT NOT NULL, reason TEXT NOT NULL,
    num_rounds INTEGER NOT NULL, num_parameters INTEGER NOT NULL, num_classes INTEGER NOT NULL,
    min_clients INTEGER NOT NULL, started REAL NOT NULL, ended REAL
) STRICT;
CREATE TABLE rounds (
    round INTEGER PRIMARY KEY, attempt INTEGER NOT NULL,
    train_loss REAL, accuracy REAL, central_accuracy REAL, central_loss REAL,
    seconds REAL, bytes_up INTEGER NOT NULL, bytes_down INTEGER NOT NULL, best_round INTEGER, time REAL NOT NULL,
    virtual_seconds REAL
) STRICT;
CREATE TABLE void_attempts (
    round INTEGER NOT NULL, attempt INTEGER NOT NULL, reason TEXT NOT NULL, time REAL NOT NULL,
    PRIMARY KEY (round, attempt)
) STRICT;
CREATE TABLE participation (
    round INTEGER NOT NULL, attempt INTEGER NOT NULL, client TEXT NOT NULL,
    status TEXT NOT NULL, reason TEXT NOT NULL,
    num_examples INTEGER, train_loss REAL, accuracy REAL, seconds REAL,
    num_steps INTEGER, batch_size INTEGER, client_lr REAL, staleness INTEGER, number INTEGER NOT NULL,
    PRIMARY KEY (round, attempt, client, number)
) STRICT;
CREATE TABLE stores (
    client TEXT PRIMARY KEY, round INTEGER NOT NULL, best TEXT,
    local REAL, global REAL, personalized REAL, on_test INTEGER NOT NULL, reason TEXT NOT NULL
) STRICT;
CREATE TABLE events (id INTEGER PRIMARY KEY, time REAL NOT NULL, kind TEXT NOT NULL, record TEXT NOT NULL) STRICT;
"""


class RunDatabase:
    """Records events. Thread-safe.

    Args:
        path: the file; created if it does not exist.
        now: returns the time in seconds since 1970, for the rows' time stamps.

    Raises:
        RunError: the file cannot be written, is not a run database, or is from a newer FedShelf.
    """

    def __init__(self, path: Path, *, now: Callable[[], float] = time.time) -> None:
        make_folder(path.parent)
        self._path = path
        self._now = now
        self._lock = threading.Lock()
        with translating_os_errors("write", path):
            os.close(open_private(path, os.O_RDWR | os.O_CREAT))  # SQLite gives its other files the same mode
        with self._explained():
            # Transactions are started explicitly; a lock serializes threads.
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
        try:
            with self._explained():
                self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def emit(self, event: Event) -> None:
        """Record an event. Repeating an event changes only the table of events.

        Raises:
            RunError: the database cannot be written, for example on a full disk.
        """
        self.emit_all([event])

    def emit_all(self, events: Sequence[Event]) -> None:
        """Record events in order, in one transaction.

        Raises:
            RunError: the database cannot be written, for example on a full disk.
        """
        durable = any(isinstance(event, RoundFinished | StoresCompared | RunEnded) for event in events)
        with self._lock, self._explained(), self._transaction(durable=durable):
            now = self._now()
            for event in events:
                self._write(event, now)

    def record_failure(self, reason: str) -> None:
        """Record why the run failed, unless its end is recorded already.

        Raises:
            RunError: the database cannot be written.
        """
        with self._lock, self._explained(), self._transaction(durable=True):
            if self._connection.execute("SELECT 1 FROM run WHERE status = ?", (RunStatus.RUNNING.value,)).fetchone():
                self._write(RunEnded(status=RunStatus.FAILED, reason=reason), self._now())

    def close(self) -> None:
        """Merge the log into the file, so that the file can be copied and read on its own."""
        with self._lock:
            # With a reader active, the log stays as a separate file, which is equivalent on this machine.
            with suppress(sqlite3.Error):
                self._connection.execute("PRAGMA busy_timeout = 0")
                self._connection.execute("PRAGMA journal_mode = DELETE")
            self._connection.close()

    def _prepare(self) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise RunError(
                f"'{self._path}' was written by a newer FedShelf (schema {version}, this one writes "
                f"{SCHEMA_VERSION}). Go on with that version, or newer."
            )
        self._connection.execute("PRAGMA journal_mode = WAL")
        if version == 1:
            raise RunError(
                f"'{self._path}' was written by an older FedShelf (schema 1, this one writes {SCHEMA_VERSION}). Go on "
                "with that version, or start a new run."
            )
        if version == 0:
            self._connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")

    def _write(self, event: Event, now: float) -> None:
        self._insert("events", time=now, kind=records.kind(event), record=records.to_json(event))
        if isinstance(event, RunStarted):
            self._run_started(event, now)
        elif isinstance(event, CatalogueChanged):
            sizes = (event.num_classes, event.num_parameters)
            self._connection.execute("UPDATE run SET num_classes = ?, num_parameters = ?", sizes)
        elif isinstance(event, RoundFinished):
            self._round_finished(event, now)
        elif isinstance(event, RoundVoid):
            self._round_void(event, now)
        elif isinstance(event, StoresCompared):
            self._stores_compared(event)
        elif isinstance(event, RunEnded):
            self._run_ended(event, now)

    def _run_started(self, event: RunStarted, now: float) -> None:
        known = self._connection.execute("SELECT started FROM run").fetchone()
        self._replace(
            "run",
            id=1,
            run_id=event.run_id,
            status=RunStatus.RUNNING.value,
            reason="",
            num_rounds=event.num_rounds,
            num_parameters=event.num_parameters,
            num_classes=event.num_classes,
            min_clients=event.min_clients,
            started=known[0] if known else now,
            ended=None,
        )

    def _round_finished(self, event: RoundFinished, now: float) -> None:
        self._connection.execute(
            "DELETE FROM void_attempts WHERE round = ? AND attempt = ?", (event.round, event.attempt)
        )
        self._replace(
            "rounds",
            round=event.round,
            attempt=event.attempt,
            train_loss=event.train_loss,
            accuracy=event.accuracy,
            central_accuracy=event.central_accuracy,
            central_loss=event.central_loss,
            seconds=event.seconds,
            bytes_up=event.bytes_up,
            bytes_down=event.bytes_down,
            best_round=event.best_round,
            time=now,
            virtual_seconds=event.virtual_seconds,
        )
        self._participations(event.round, event.attempt, event.clients)

    def _round_void(self, event: RoundVoid, now: float) -> None:
        # A round that finished, lost its checkpoint, and is void when repeated is no longer finished.
        self._connection.execute("DELETE FROM rounds WHERE round = ? AND attempt = ?", (event.round, event.attempt))
        self._replace("void_attempts", round=event.round, attempt=event.attempt, reason=event.reason, time=now)
        self._participations(event.round, event.attempt, event.clients)

    def _stores_compared(self, event: StoresCompared) -> None:
        self._connection.execute("DELETE FROM stores")
        for store in event.stores:
            self._insert(
                "stores",
                client=store.client,
                round=event.round,
                best=store.best.value if store.best else None,
                **{candidate.value: store.accuracies.get(candidate) for candidate in Candidate},
                on_test=store.on_test,
                reason=store.reason,
            )

    def _run_ended(self, event: RunEnded, now: float) -> None:
        self._connection.execute(
            "UPDATE run SET status = ?, reason = ?, ended = ?", (event.status.value, event.reason, now)
        )

    def _participations(self, round: int, attempt: int, clients: tuple[Participation, ...]) -> None:
        self._connection.execute("DELETE FROM participation WHERE round = ? AND attempt = ?", (round, attempt))
        for client in clients:
            fields = dataclasses.asdict(client) | {"status": client.status.value}
            self._insert("participation", round=round, attempt=attempt, **fields)

    def _insert(self, table: str, **values: str | float | None) -> None:
        self._put("INSERT", table, values)

    def _replace(self, table: str, **values: str | float | None) -> None:
        self._put("INSERT OR REPLACE", table, values)

    def _put(self, verb: str, table: str, values: dict[str, str | float | None]) -> None:
        """Insert or replace a row. Names of tables and columns are constants of this module, never data."""
        finite = [records.finite(value) if isinstance(value, float) else value for value in values.values()]
        marks = ", ".join("?" * len(values))
        self._connection.execute(f"{verb} INTO {table} ({', '.join(values)}) VALUES ({marks})", finite)

    @contextmanager
    def _transaction(self, *, durable: bool) -> Iterator[None]:
        """Run a transaction. With a write-ahead log, FULL fsyncs at commit; NORMAL leaves that to the system."""
        self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # a full disk may have rolled it back already
                self._connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise RunError(
                f"cannot write the run database '{self._path}': {error}. Make sure that its disk has space and can be "
                f"written to, then start the run again: it goes on where it was."
            ) from error
