"""Read-only queries of a run's database, also while the run is active."""

import dataclasses
import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fedshelf.core.choices import Candidate
from fedshelf.core.class_folder import ProductCount
from fedshelf.core.errors import RunError
from fedshelf.core.events import (
    ClientStatus,
    NoiseReported,
    Participation,
    ProductReport,
    RoundFinished,
    RoundVoid,
    RunStatus,
    StoreComparison,
)
from fedshelf.data.catalogue import Catalogue
from fedshelf.storage.atomic_files import translating_os_errors
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.tracking.database import SCHEMA_VERSION
from fedshelf.tracking.product_results import NO_RESULTS, ProductResults, product_results

MISSING, EMPTY = (
    f"its database run.db is {what}, though it has checkpoints: restore run.db from a copy to see its rounds"
    for what in ("missing", "empty")
)
LOST = (MISSING, EMPTY)
UNEXPLAINED = (
    "its process ended without recording why: it was killed, the machine went down, or the disk was full. Look at what "
    "it printed last, and at the system's log"
)
_CLIENT_KEYS = ("client", "status", "reason", "num_examples", "accuracy", "staleness", "batch_size", "client_lr")

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """A run's current state; unknown values are None.

    Attributes:
        run_id: the run's id.
        status: the run's status.
        reason: why it has this status.
        rounds: the finished rounds.
        best_round: the best round so far.
        num_parameters: number of the model's parameters.
        num_rounds: number of rounds planned.
        started: start time in seconds since 1970.
        voids: attempts without a quorum.
        stores: the stores' comparisons.
        refused: by store, why it is refused, or a kind of task by it, since it last joined.
        num_classes: number of classes.
        num_test: number of test photos at the server.
        num_test_left_out: number of test photos of classes that no client has.
        results: results by product, of a run that has reached its last round.
        noise: the noise of each client's releases by client, and that of the server's under "".
    """

    run_id: str
    status: RunStatus
    reason: str
    rounds: tuple[RoundFinished, ...]
    best_round: int | None
    num_parameters: int | None
    num_rounds: int | None
    started: float | None
    voids: tuple[RoundVoid, ...]
    stores: tuple[StoreComparison, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    num_classes: int | None = None
    num_test: int | None = None
    num_test_left_out: int = 0
    results: ProductResults = NO_RESULTS
    noise: Mapping[str, NoiseReported] = dataclasses.field(default_factory=dict)

    @property
    def num_done(self) -> int:
        """Number of finished rounds, of those that were planned: neither a warm start nor a refit."""
        return sum(0 < record.round <= (self.num_rounds or record.round) for record in self.rounds)

    def to_record(self) -> dict[str, Any]:
        """Return the output of `fedshelf runs show --json`. Scripts rely on these keys: do not remove any."""
        return {
            "run_id": self.run_id,
            "status": self.status.value,
            "reason": self.reason,
            "rounds": [_round_record(round_) for round_ in self.rounds],
            "best_round": self.best_round,
            "num_parameters": self.num_parameters,
            "void_rounds": len(self.voids),
            "void_attempts": [
                {
                    "round": void.round,
                    "attempt": void.attempt,
                    "reason": void.reason,
                    "clients": [_client_record(client) for client in void.clients],
                }
                for void in self.voids
            ],
            "stores": [_store_record(store) for store in self.stores],
            "refused": [{"client": client, "reason": reason} for client, reason in sorted(self.refused.items())],
            **self.results.to_record(),
        }


def run_summary(path: Path) -> RunSummary:
    """Read a run.

    Args:
        path: the run's directory.

    Returns:
        The run's current state.

    Raises:
        RunError: there is no run, or its database cannot be read.
    """
    directory = RunDirectory.open(path)
    alive = directory.owner() is not None
    with translating_os_errors("read", directory.database):
        is_there = directory.database.is_file()
    if not is_there:
        return _summary(directory, alive=alive)
    with _reading(directory.database) as connection:
        if not _has_table(connection, "run"):
            return _summary(directory, alive=alive)  # killed while it was being created
        run = connection.execute("SELECT * FROM run").fetchone()
        clients = _clients(connection)
        rounds, voids, stores = _rounds(connection, clients), _voids(connection, clients), _stores(connection)
        started = connection.execute("SELECT record FROM events WHERE kind = 'run_started' ORDER BY id DESC").fetchone()
        record = json.loads(started["record"]) if started else {}
        return dataclasses.replace(
            _summary(directory, alive=alive, run=run, rounds=rounds, voids=voids, stores=stores),
            num_classes=record.get("num_classes") if run is None else run["num_classes"],
            num_test=record.get("num_test"), num_test_left_out=record.get("num_test_left_out", 0),
            results=_results(connection, directory, rounds), noise=_noise(connection), refused=_refused(connection),
        )  # fmt: skip


def model_digest(path: Path, round: int) -> str:
    """The digest of the model after a finished round; "" if it is not known.

    Args:
        path: the run's directory.
        round: the round's number.

    Raises:
        RunError: the run's database cannot be read.
    """
    with _reading(RunDirectory.open(path).database) as connection:
        found = connection.execute(
            "SELECT json_extract(record, '$.model_digest') FROM events WHERE kind = 'round_finished' AND "
            "json_extract(record, '$.round') = ? ORDER BY id DESC", (round,)
        ).fetchone()  # fmt: skip
    return str(found[0] or "") if found else ""


def _summary(
    directory: RunDirectory,
    *,
    alive: bool,
    run: sqlite3.Row | None = None,
    rounds: tuple[RoundFinished, ...] = (),
    voids: tuple[RoundVoid, ...] = (),
    stores: tuple[StoreComparison, ...] = (),
) -> RunSummary:
    status, reason = (RunStatus.RUNNING, "") if run is None else (RunStatus(run["status"]), run["reason"])
    if status is RunStatus.RUNNING and not alive:
        status, reason = RunStatus.STOPPED, "before its first round" if run is None else UNEXPLAINED
    if run is None and directory.has_checkpoint:
        reason = EMPTY if directory.database.exists() else MISSING
    return RunSummary(
        run_id=directory.run_id,
        status=status,
        reason=reason,
        rounds=rounds,
        best_round=rounds[-1].best_round if rounds else None,
        num_parameters=None if run is None else run["num_parameters"],
        num_rounds=None if run is None else run["num_rounds"],
        started=None if run is None else run["started"],
        voids=voids,
        stores=stores,
    )


_Clients = dict[tuple[int, int], list[Participation]]  # by round and attempt


def _clients(connection: sqlite3.Connection) -> _Clients:
    clients: _Clients = {}
    for row in connection.execute("SELECT * FROM participation ORDER BY client, rowid"):
        client = _from_row(Participation, row, status=ClientStatus(row["status"]))
        clients.setdefault((row["round"], row["attempt"]), []).append(client)
    return clients


def _voids(connection: sqlite3.Connection, clients: _Clients) -> tuple[RoundVoid, ...]:
    return tuple(
        _from_row(RoundVoid, row, clients=tuple(clients.get((row["round"], row["attempt"]), ())))
        for row in connection.execute("SELECT * FROM void_attempts ORDER BY round, attempt")
    )


def _rounds(connection: sqlite3.Connection, clients: _Clients) -> tuple[RoundFinished, ...]:
    return tuple(
        _from_row(RoundFinished, row, clients=tuple(clients.get((row["round"], row["attempt"]), ())))
        for row in connection.execute("SELECT * FROM rounds ORDER BY round")
    )


def _stores(connection: sqlite3.Connection) -> tuple[StoreComparison, ...]:
    if not _has_table(connection, "stores"):  # created by an older FedShelf
        return ()
    return tuple(
        StoreComparison(
            client=row["client"],
            best=Candidate(row["best"]) if row["best"] else None,
            accuracies={c: row[c.value] for c in Candidate if row[c.value] is not None},
            on_test=bool(row["on_test"]),
            reason=row["reason"],
        )
        for row in connection.execute("SELECT * FROM stores ORDER BY client")
    )


def _noise(connection: sqlite3.Connection) -> dict[str, NoiseReported]:
    records = connection.execute("SELECT record FROM events WHERE kind = 'noise_reported' ORDER BY id")
    fields = [json.loads(row["record"]) for row in records]
    reports = [NoiseReported(**{key: value for key, value in each.items() if key != "event"}) for each in fields]
    # Of several, the one that protects least, because it is not known which releases had it.
    return {report.client: report for report in sorted(reports, key=_loss)}


def _loss(noise: NoiseReported) -> float:
    """About how much a release with that noise tells."""
    return noise.steps * (noise.sampling_rate / max(noise.noise_multiplier, 1e-9)) ** 2


def _refused(connection: sqlite3.Connection) -> dict[str, str]:
    """By client, the newest refusal since it last joined."""
    refused: dict[str, str] = {}
    events = "SELECT kind, record FROM events WHERE kind IN ('client_joined', 'client_refused') ORDER BY id"
    for row in connection.execute(events):
        record = json.loads(row["record"])
        refused.pop(record["client"], None)
        if row["kind"] == "client_refused":
            refused[record["client"]] = record["reason"]
    return refused


def _results(
    connection: sqlite3.Connection, directory: RunDirectory, rounds: tuple[RoundFinished, ...]
) -> ProductResults:  # fmt: skip
    """Read the product report of the newest finished round, if it was the last of the run."""
    newest = "SELECT record FROM events WHERE kind = 'round_finished' ORDER BY id DESC LIMIT 1"
    row = connection.execute(newest).fetchone()
    record = json.loads(row["record"]) if row and rounds else {}
    report = record.get("report")
    if report is None or record["round"] != rounds[-1].round or not directory.catalogue.is_file():
        return NO_RESULTS
    products = tuple(ProductCount(**product) for product in report["products"])
    return product_results(ProductReport(**{**report, "products": products}), Catalogue.load(directory.catalogue))


def _from_row(kind: type[_T], row: sqlite3.Row, **converted: Any) -> _T:
    """Create an event from the columns of its fields; a column that an older FedShelf did not have keeps its default.

    Args:
        kind: the event's class.
        row: the row.
        converted: fields that are no column, or not one of the same type.
    """
    names = {field.name for field in dataclasses.fields(kind)} & set(row.keys())  # type: ignore[arg-type]
    return kind(**{**{name: row[name] for name in names}, **converted})


def _has_table(connection: sqlite3.Connection, name: str) -> bool:
    return connection.execute("SELECT 1 FROM sqlite_schema WHERE name = ?", (name,)).fetchone() is not None


def _store_record(store: StoreComparison) -> dict[str, Any]:
    accuracies = {candidate.value: store.accuracies.get(candidate) for candidate in Candidate}
    return {"client": store.client, **accuracies, "best": store.best}


def _round_record(round_: RoundFinished) -> dict[str, Any]:
    return {
        "round": round_.round,
        "train_loss": round_.train_loss,
        "accuracy": round_.accuracy,
        "central_accuracy": round_.central_accuracy,
        "seconds": round_.seconds,
        "virtual_seconds": round_.virtual_seconds,
        "bytes_up": round_.bytes_up,
        "bytes_down": round_.bytes_down,
        "clients": [_client_record(client) for client in round_.clients],
    }


def _client_record(client: Participation) -> dict[str, Any]:
    return {name: getattr(client, name) for name in _CLIENT_KEYS}


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a connection with a consistent snapshot of the run."""
    try:
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=10, isolation_level=None)) as connection:
            connection.row_factory = sqlite3.Row
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA_VERSION:
                raise RunError(
                    f"'{path}' was written by a newer FedShelf (schema {version}). Use that version, or newer."
                )
            connection.execute("BEGIN")
            yield connection
    except (sqlite3.Error, ValueError, LookupError, TypeError) as error:  # a file of another program, or damaged
        raise RunError(f"cannot read the run database '{path}': {error}. Restore it from a copy.") from error
