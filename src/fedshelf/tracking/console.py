"""A run as a person watches it: one line per finished round, one per trouble, and below them what is going on now.

Where the output is no terminal (a log file, CI) only the lines are written, plain.
"""

import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from fedshelf.core.events import (
    ClientExcluded,
    ClientJoined,
    ClientLeft,
    ClientRefused,
    ClientStatus,
    ComparisonReceived,
    ComparisonStarted,
    Event,
    Participation,
    RoundFinished,
    RoundStarted,
    RoundVoid,
    RunEnded,
    RunStarted,
    RunStatus,
    StoreComparison,
    StoresCompared,
    UploadReceived,
    Waiting,
)
from fedshelf.reporting.formatting import duration, number, percent, printable
from fedshelf.reporting.gain_report import figures, verdict
from fedshelf.reporting.stragglers import StragglerTracker, advice

MOST_NAMED = 20  # clients that are named as they join before the first round


class ConsoleSink:
    """Live progress of a server or a simulation.

    Args:
        console: where to; standard output if none is given.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._bar = _Bar(self._console) if self._console.is_terminal else None
        self._num_rounds = 0
        self._joined: set[str] = set()
        self._min_clients = 0
        self._seconds: list[float] = []
        self._best_round: int | None = None
        self._named: set[str] = set()  # whom of this round's cohort a warning has named
        self._late = StragglerTracker()

    def emit(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._run_started(event)
            case ClientJoined():
                self._joined.add(event.client)
                self._client_joined(event)
            case ClientLeft():
                self._joined.discard(event.client)
                self._warn(f"{printable(event.client)} has gone: {printable(event.reason)}")
            case ClientExcluded():
                self._joined.discard(event.client)
                self._warn(f"{printable(event.client)} is excluded from the run: {printable(event.reason)}")
            case Waiting():
                self._waiting(event)
            case ClientRefused():
                self._warn(f"{printable(event.client)} refused: {printable(event.reason)}")
            case RoundStarted():
                self._round_started(event)
            case UploadReceived():
                self._upload_received(event)
            case RoundVoid():
                self._round_void(event)
            case RoundFinished():
                self._round_finished(event)
            case ComparisonStarted():
                self._comparison_started(event)
            case ComparisonReceived():
                self._show(f"comparing models: {event.num_done}/{event.num_stores} stores in")
            case StoresCompared():
                self._stores_compared(event)
            case RunEnded():
                self._run_ended(event)

    def close(self) -> None:
        """Take the bar away; needed only where no RunEnded came. A second call does nothing."""
        if self._bar is not None:
            self._bar.stop()

    def _run_started(self, event: RunStarted) -> None:
        self._num_rounds, self._min_clients = event.num_rounds, event.min_clients
        goes_on = f", goes on with round {event.first_round}" if event.first_round > 1 else ""
        if event.first_round > event.num_rounds:
            goes_on = ", goes on after the last round"
        self._say(
            f"run {event.run_id}: {event.num_rounds} rounds, {event.num_parameters:,} parameters, "
            f"{event.num_classes} classes{goes_on}",
            style="bold",
        )
        if self._bar is not None:
            self._bar.start(total=event.num_rounds, done=event.first_round - 1)

    def _client_joined(self, event: ClientJoined) -> None:
        if len(self._joined) > MOST_NAMED and not self._seconds:
            self._show(f"{len(self._joined)} clients are there, {self._min_clients} are needed to start")
            return  # a thousand simulated stores are a number, not a thousand lines
        left_out = f", {event.num_left_out} left out" if event.num_left_out else ""
        gate = f" ({len(self._joined)} there, {self._min_clients} needed to start)" if not self._seconds else ""
        self._say(
            f"{printable(event.client)} joined: {event.num_train} photos to train on, "
            f"{event.num_validation} to check with{left_out}{gate}"
        )

    def _waiting(self, event: Waiting) -> None:
        there = f"; there: {_names(event.live)}" if event.live else "; nobody is there"
        missing = f"; missing: {_names(event.missing)}" if event.missing else ""
        self._warn(f"waiting for {event.what}, since {duration(event.seconds)}{there}{missing}")

    def _round_started(self, event: RoundStarted) -> None:
        self._named.clear()
        again = f", attempt {event.attempt + 1}" if event.attempt else ""
        self._show(f"round {event.round}/{self._num_rounds}{again}: 0/{len(event.cohort)} clients in")

    def _upload_received(self, event: UploadReceived) -> None:
        if event.status is not ClientStatus.COUNTED:
            self._warn_of(event.round, event.client, event.status, event.reason)
        self._show(f"round {event.round}/{self._num_rounds}: {event.num_done}/{event.num_cohort} clients in")

    def _round_void(self, event: RoundVoid) -> None:
        self._warn_of_others(event.round, event.clients)
        self._warn(
            f"round {event.round}, attempt {event.attempt + 1} is void and tried again: {printable(event.reason)}"
        )

    def _round_finished(self, event: RoundFinished) -> None:
        self._seconds.append(event.seconds)
        counted = sum(client.status is ClientStatus.COUNTED for client in event.clients)
        figures = [f"loss {number(event.train_loss)}", f"accuracy {percent(event.accuracy)}"]
        if event.central_accuracy is not None:
            figures.append(f"central {percent(event.central_accuracy)}")
        left = (self._num_rounds - event.round) * statistics.median(self._seconds)
        best = "  best so far" if event.best_round == event.round else ""
        line = "  ".join(
            [f"round {event.round}/{self._num_rounds}", f"clients {counted}/{len(event.clients)}", *figures]
        )
        self._say(f"{line}  {duration(event.seconds)}  left {duration(left)}{best}")
        self._best_round = event.best_round
        self._warn_of_others(event.round, event.clients)
        if sentence := advice(self._late.add(event.clients)):
            self._warn(sentence)
        if self._bar is not None:
            self._bar.advance_to(event.round, left=duration(left))

    def _warn_of_others(self, round: int, clients: tuple[Participation, ...]) -> None:
        """Who answered badly was named when the answer came; those who never did are named when the round ends."""
        for client in clients:
            if client.status is not ClientStatus.COUNTED and client.client not in self._named:
                self._warn_of(round, client.client, client.status, client.reason)

    def _warn_of(self, round: int, client: str, status: ClientStatus, reason: str) -> None:
        self._named.add(client)
        because = f": {printable(reason)}" if reason else ""
        self._warn(f"round {round}: {printable(client)} was not counted, {status.value}{because}")

    def _comparison_started(self, event: ComparisonStarted) -> None:
        self._say(f"{len(event.stores)} stores compare what they can choose among; each trains a model alone for that")
        self._show(f"comparing models: 0/{len(event.stores)} stores in")

    def _stores_compared(self, event: StoresCompared) -> None:
        for store in event.stores if len(event.stores) <= MOST_NAMED else ():
            self._store_compared(store)
        if sentence := verdict(event.stores):
            self._say(sentence, style="bold")

    def _store_compared(self, store: StoreComparison) -> None:
        if store.best is None:
            self._warn(f"{printable(store.client)} has compared nothing: {printable(store.reason)}")
            return
        self._say(f"{printable(store.client)} keeps the {store.best.value} model{figures(store.accuracies)}")

    def _run_ended(self, event: RunEnded) -> None:
        self.close()
        if event.status is RunStatus.FAILED:
            return  # the error itself says it: whoever runs the command prints that
        best = f", best round {self._best_round}" if self._best_round is not None else ""
        reason = f": {printable(event.reason)}" if event.reason else ""
        style = "bold green" if event.status is RunStatus.FINISHED else "bold yellow"
        self._say(f"run {event.status.value}{reason}{best}", style=style)

    def _say(self, line: str, style: str = "") -> None:
        # Text, not markup: a client's name may hold brackets. Soft wrap: a log line stays one line.
        self._console.print(Text(line, style=style), soft_wrap=True, highlight=False)

    def _warn(self, line: str) -> None:
        self._say(f"warning: {line}", style="yellow")

    def _show(self, status: str) -> None:
        if self._bar is not None:
            self._bar.show(status)


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(map(printable, names[:MOST_NAMED])) + more


class _Bar:
    """What is going on now, below the lines; terminals only."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.fields[status]}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} rounds"),
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
            transient=True,
            refresh_per_second=4,
        )
        self._task: TaskID | None = None

    def start(self, *, total: int, done: int) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task("", total=total, completed=done, status="waiting for clients", left="")
        self._progress.start()

    def show(self, status: str) -> None:
        if self._task is not None:
            self._progress.update(self._task, status=status)

    def advance_to(self, done: int, *, left: str) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=done, left=f"left {left}")

    def stop(self) -> None:
        self._progress.stop()
