"""Read-only queries of a run's database, also while the run is active."""

import dataclasses
import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedshelf.core.choices import Candidate
from fedshelf.core.errors import RunError
from fedshelf.core.events import ClientStatus, RunStatus
from fedshelf.storage.atomic_files import saying_what_to_do
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.tracking.database import SCHEMA_VERSION

UNEXPLAINED = "its process ended without saying why: it was killed, ran out of memory, or lost power"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientSummary:
    """One client's part in a round; see `core.events.Participation`.

    Attributes:
        client: the client's name.
        status: how the round ended for it.
        reason: why it was not counted, or how its upload was modified; empty if neither.
        num_examples: number of its training photos.
        accuracy: validation accuracy, a fraction.
        staleness: number of model versions its upload was behind (asynchronous rounds).
        batch_size: its batch size.
        client_lr: its learning rate.
    """

    client: str
    status: ClientStatus
    reason: str
    num_examples: int | None
    accuracy: float | None
    staleness: int | None
    batch_size: int | None
    client_lr: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundSummary:
    """One finished round; see `core.events.RoundFinished`.

    Attributes:
        round: the round.
        train_loss: mean training loss.
        accuracy: validation accuracy over the stores, a fraction.
        central_accuracy: accuracy on the server's test photos, a fraction.
        seconds: duration.
        bytes_up: bytes received from clients.
        bytes_down: bytes sent to clients.
        best_so_far: the best round when this one ended.
        virtual_seconds: virtual time of a simulation.
        clients: the cohort.
    """

    round: int
    train_loss: float | None
    accuracy: float | None
    central_accuracy: float | None
    seconds: float | None
    bytes_up: int
    bytes_down: int
    best_so_far: int | None
    virtual_seconds: float | None
    clients: tuple[ClientSummary, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSummary:
    """One store's comparison; see `core.events.StoreComparison`.

    Attributes:
        client: the store's name.
        best: the model that it keeps.
        accuracies: accuracy by model, a fraction.
        on_test: whether the models were compared on test photos instead of validation photos.
        reason: why there is no comparison.
    """

    client: str
    best: Candidate | None
    accuracies: Mapping[Candidate, float | None]
    on_test: bool
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class VoidAttempt:
    """An attempt without a quorum.

    Attributes:
        round: the round.
        attempt: the attempt.
        reason: why it is void.
        clients: how it ended for each client of the cohort.
    """

    round: int
    attempt: int
    reason: str
    clients: tuple[ClientSummary, ...]


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
        num_classes: number of classes.
        num_test: number of test photos at the server.
        num_test_left_out: number of test photos of classes that no client has.
    """

    run_id: str
    status: RunStatus
    reason: str
    rounds: tuple[RoundSummary, ...]
    best_round: int | None
    num_parameters: int | None
    num_rounds: int | None
    started: float | None
    voids: tuple[VoidAttempt, ...]
    stores: tuple[StoreSummary, ...]
    num_classes: int | None = None
    num_test: int | None = None
    num_test_left_out: int = 0

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
    with saying_what_to_do("read", directory.database):
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
            num_classes=record.get("num_classes"), num_test=record.get("num_test"),
            num_test_left_out=record.get("num_test_left_out", 0),
        )  # fmt: skip


def _summary(
    directory: RunDirectory,
    *,
    alive: bool,
    run: sqlite3.Row | None = None,
    rounds: tuple[RoundSummary, ...] = (),
    voids: tuple[VoidAttempt, ...] = (),
    stores: tuple[StoreSummary, ...] = (),
) -> RunSummary:
    status, reason = (RunStatus.RUNNING, "") if run is None else (RunStatus(run["status"]), run["reason"])
    if status is RunStatus.RUNNING and not alive:
        status, reason = RunStatus.STOPPED, "before its first round" if run is None else UNEXPLAINED
    return RunSummary(
        run_id=directory.run_id,
        status=status,
        reason=reason,
        rounds=rounds,
        best_round=rounds[-1].best_so_far if rounds else None,
        num_parameters=None if run is None else run["num_parameters"],
        num_rounds=None if run is None else run["num_rounds"],
        started=None if run is None else run["started"],
        voids=voids,
        stores=stores,
    )


_Clients = dict[tuple[int, int], list[ClientSummary]]  # by round and attempt


def _clients(connection: sqlite3.Connection) -> _Clients:
    clients: _Clients = {}
    for row in connection.execute("SELECT * FROM participation ORDER BY client, rowid"):
        clients.setdefault((row["round"], row["attempt"]), []).append(
            ClientSummary(
                client=row["client"],
                status=ClientStatus(row["status"]),
                reason=row["reason"],
                num_examples=row["num_examples"],
                accuracy=row["accuracy"],
                staleness=_since_schema_2(row, "staleness"),
                batch_size=_since_schema_2(row, "batch_size"),
                client_lr=_since_schema_2(row, "client_lr"),
            )
        )
    return clients


def _voids(connection: sqlite3.Connection, clients: _Clients) -> tuple[VoidAttempt, ...]:
    return tuple(
        VoidAttempt(
            round=row["round"],
            attempt=row["attempt"],
            reason=row["reason"],
            clients=tuple(clients.get((row["round"], row["attempt"]), ())),
        )
        for row in connection.execute("SELECT * FROM void_attempts ORDER BY round, attempt")
    )


def _rounds(connection: sqlite3.Connection, clients: _Clients) -> tuple[RoundSummary, ...]:
    return tuple(
        RoundSummary(
            round=row["round"],
            train_loss=row["train_loss"],
            accuracy=row["accuracy"],
            central_accuracy=row["central_accuracy"],
            seconds=row["seconds"],
            bytes_up=row["bytes_up"],
            bytes_down=row["bytes_down"],
            best_so_far=row["best_round"],
            virtual_seconds=_since_schema_2(row, "virtual_seconds"),
            clients=tuple(clients.get((row["round"], row["attempt"]), ())),
        )
        for row in connection.execute("SELECT * FROM rounds ORDER BY round")
    )


def _stores(connection: sqlite3.Connection) -> tuple[StoreSummary, ...]:
    if not _has_table(connection, "stores"):  # created by an older FedShelf
        return ()
    return tuple(
        StoreSummary(
            client=row["client"],
            best=Candidate(row["best"]) if row["best"] else None,
            accuracies={candidate: row[candidate.value] for candidate in Candidate},
            on_test=bool(row["on_test"]),
            reason=row["reason"],
        )
        for row in connection.execute("SELECT * FROM stores ORDER BY client")
    )


def _since_schema_2(row: sqlite3.Row, column: str) -> Any:
    return row[column] if column in row.keys() else None  # noqa: SIM118  iterating a row gives values


def _has_table(connection: sqlite3.Connection, name: str) -> bool:
    return connection.execute("SELECT 1 FROM sqlite_schema WHERE name = ?", (name,)).fetchone() is not None


def _store_record(store: StoreSummary) -> dict[str, Any]:
    accuracies = {candidate.value: accuracy for candidate, accuracy in store.accuracies.items()}
    return {"client": store.client, **accuracies, "best": store.best}


def _round_record(round_: RoundSummary) -> dict[str, Any]:
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


def _client_record(client: ClientSummary) -> dict[str, Any]:
    return {**dataclasses.asdict(client), "status": client.status.value}


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
