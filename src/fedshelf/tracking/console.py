"""Live console output of a run: one line per finished round and per problem, and a status line.

If the output is not a terminal (a log file, a service's journal), only the lines are written, as plain text.
"""

import statistics
from collections.abc import Iterable

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from fedshelf.core.events import (
    NOT_TOLD,
    CatalogueChanged,
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
    WeightsLoaded,
)
from fedshelf.core.text import counted, printable
from fedshelf.reporting.formatting import ABSENT, caveats, duration, number, percent
from fedshelf.reporting.gain_report import figures, verdict
from fedshelf.reporting.stragglers import StragglerTracker, advice
from fedshelf.tracking.terminal import make_console, print_line

MOST_NAMED = 20  # maximum number of clients named as they join before the first round
MOST_MISSING = 5  # maximum number of stores named in a round's line


class ConsoleSink:
    """Shows the progress of a server or a simulation.

    Args:
        console: the output; None uses standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or make_console()
        self._bar = _Bar(self._console) if self._console.is_interactive else None
        self._num_rounds = 0
        self._joined: set[str] = set()
        self._have_joined: set[str] = set()  # and may have left again
        self._min_clients = 0
        self._seconds: list[float] = []
        self._best_round: int | None = None
        self._caveats: dict[str, str] = {}  # warnings about accuracies that say little
        self._awaited: dict[str, None] = {}  # clients whose answer is pending, in the order of names
        self._num_counted = 0
        self._named: dict[str, str] = {}  # clients of this round's cohort that a warning has named
        self._late = StragglerTracker()

    def emit(self, event: Event) -> None:
        """Show an event."""
        match event:
            case RunStarted():
                self._run_started(event)
            case WeightsLoaded():
                self._weights_loaded(event)
            case CatalogueChanged():
                self._catalogue_changed(event)
            case ClientJoined():
                self._joined.add(event.client)
                self._have_joined.add(event.client)
                self._client_joined(event)
            case ClientLeft():
                self._joined.discard(event.client)
                lost = (
                    f"lost {event.client}"
                    if event.client in self._have_joined
                    else f"{event.client} left before it had joined"
                )
                self._warn(f"{lost}: {event.reason}")
            case ClientExcluded():
                self._joined.discard(event.client)
                until = "from the run" if event.last_round is None else f"until after round {event.last_round}"
                self._warn(f"excluded {event.client} {until}: {event.reason}")
            case Waiting():
                self._waiting(event)
            case ClientRefused() if self._named.get(event.client) != event.reason:
                self._warn(f"refused {event.client}: {event.reason}")
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
                self._awaited.pop(event.client, None)
                self._show(f"comparing models: {event.num_done} of {counted(event.num_stores, 'store')} done")
            case StoresCompared():
                self._stores_compared(event)
            case RunEnded():
                self._run_ended(event)

    def close(self) -> None:
        """Remove the progress bar, which RunEnded also does. Idempotent."""
        if self._bar is not None:
            self._bar.stop()

    def _run_started(self, event: RunStarted) -> None:
        self._num_rounds, self._min_clients = event.num_rounds, event.min_clients
        resumed = f", resuming with round {event.first_round}" if event.first_round > 1 else ""
        if event.first_round > event.num_rounds:
            resumed = ", resuming after the last round"
        self._say(
            f"run {event.run_id}: {counted(event.num_rounds, 'round')}, {counted(event.num_parameters, 'parameter')}, "
            f"{counted(event.num_classes, 'class', 'classes')}{resumed}",
            style="bold",
        )
        if event.note:
            self._say(event.note)
        for caveat in caveats(event.num_classes, event.num_test, event.num_test_left_out):
            self._warn(caveat)
        if event.num_classes == 1:
            self._caveats["accuracy"] = " (one product)"
        if event.num_test_left_out:
            total = counted((event.num_test or 0) + event.num_test_left_out, "photo")
            self._caveats["central"] = f" of {event.num_test} of {total}"
        if self._bar is not None:
            self._bar.begin(total=event.num_rounds, done=max(0, event.first_round - 1))
            stores = counted(event.min_clients, "store") if event.min_clients else "stores"
            self._show(f"waiting for {stores} to join")

    def _weights_loaded(self, event: WeightsLoaded) -> None:
        said = f"the head starts fresh: {event.reason}"
        if not event.reason:
            rows = {"kept": event.kept, "moved": event.moved, "added": event.added, "dropped": event.dropped}
            said = "rows of the head: " + ", ".join(
                f"{len(names)} {what} ({_some(names, most=5)})" for what, names in rows.items() if names
            )
        self._say(f"weights from {event.file}; {said}")

    def _catalogue_changed(self, event: CatalogueChanged) -> None:
        added = counted(len(event.added), "new product") if event.added else "new names for its products"
        named = f" ({_some(event.added, most=5)})" if event.added else ""
        self._joined.clear()  # they set up again
        self._say(f"the catalogue has {added}{named} after round {event.round}: stores set up again")

    def _client_joined(self, event: ClientJoined) -> None:
        so_far = f"{len(self._joined)} of {counted(self._min_clients, 'store')} needed to start"
        if not self._min_clients:
            so_far = f"{counted(len(self._joined), 'store')} joined"
        if len(self._joined) > MOST_NAMED and not self._seconds:
            self._show(so_far)
            return  # thousands of simulated stores are shown as a count
        left_out = f", {counted(event.num_left_out, 'photo')} left out" if event.num_left_out else ""
        photos = "it does not tell its number of photos"
        if event.num_train is not None:
            photos = counted(event.num_train, "training photo")
            if event.num_validation is not None:
                photos += f", {counted(event.num_validation, 'validation photo')}"
        self._say(
            f"{event.client} joined: {photos}{left_out}"
            + (f" ({so_far})" if self._min_clients and not self._seconds else "")
        )

    def _waiting(self, event: Waiting) -> None:
        live = f"live: {_some(event.live, most=MOST_NAMED)}" if event.live else "no client is live"
        absent = [client for client in event.missing if client not in event.live]  # others are there, and being set up
        missing = f"; missing: {_some(absent, most=MOST_NAMED)}" if absent else ""
        returning = ""
        if event.returning:
            left = duration(max(0.0, event.seconds_to_return), digits=0)
            returning = (
                f"; {_some(event.returning, most=MOST_NAMED)} took part before the server's restart, and "
                f"{'has' if len(event.returning) == 1 else 'have'} {left} to return: then the run continues without "
                f"{'it' if len(event.returning) == 1 else 'them'}"
            )
        self._warn(f"waiting for {event.what} ({duration(event.seconds, digits=0)} so far); {live}{missing}{returning}")

    def _name(self, round: int) -> str:
        """A round of those that were asked for; or the one after them, in which the output layer is refitted."""
        return f"round {round}/{self._num_rounds}" if round <= self._num_rounds else f"round {round} (refit)"

    def _round_started(self, event: RoundStarted) -> None:
        self._named.clear()
        self._awaited, self._num_counted = dict.fromkeys(event.cohort), 0
        attempt = f", attempt {event.attempt + 1}" if event.attempt else ""
        self._show_round(f"{self._name(event.round)}{attempt}: ", is_complete=False)

    def _upload_received(self, event: UploadReceived) -> None:
        self._awaited.pop(event.client, None)
        if event.status is ClientStatus.COUNTED:
            self._num_counted += 1
        else:
            self._warn_of(event.round, event.client, event.status, event.reason)
        so_far = f"{self._name(event.round)}: {self._num_counted} of {event.num_cohort} counted, "
        self._show_round(so_far, is_complete=event.num_done >= event.num_cohort)

    def _show_round(self, so_far: str, *, is_complete: bool) -> None:
        if is_complete:
            self._show(f"{so_far}evaluating the new model")
            return
        line = f"{so_far}waiting for "  # in asynchronous rounds, the next client is unknown
        self._show(line + (_some(self._awaited, width=self._console.width - cell_len(line)) or "more uploads"))

    def _round_void(self, event: RoundVoid) -> None:
        self._warn_of_others(event.round, event.clients)
        self._warn(f"round {event.round}, attempt {event.attempt + 1} was void, trying again: {event.reason}")

    def _round_finished(self, event: RoundFinished) -> None:
        self._seconds.append(event.seconds)
        missing = [client for client in event.clients if client.status is not ClientStatus.COUNTED]
        left = (self._num_rounds - event.round) * statistics.median(self._seconds)
        self._warn_of_others(event.round, event.clients)
        asked = "upload" if any(client.staleness is not None for client in event.clients) else "store"
        measured = {
            "loss": number(event.train_loss), "accuracy": percent(event.accuracy),
            "central": percent(event.central_accuracy),
        }  # fmt: skip
        facts = [
            self._name(event.round),
            f"{len(event.clients) - len(missing)} of {counted(len(event.clients), asked)}",
            *(f"{name} {figure}{self._caveats.get(name, '')}" for name, figure in measured.items() if figure != ABSENT),
            duration(event.seconds),
            *["best so far"] * (event.best_round == event.round),
            *[f"{duration(left)} left"] * (self._bar is None and left > 0),
        ]
        if missing:
            named = [f"{client.client} ({client.status.value})" for client in missing]
            facts.append(f"missing: {_some(named, most=MOST_MISSING)}")
        self._say("  ".join(facts))
        self._best_round = event.best_round
        self._show("")
        if sentence := advice(self._late.add(event.clients)):
            self._warn(sentence)
        if self._bar is not None:
            self._bar.advance_to(event.round, left=f"{duration(left)} left")

    def _warn_of_others(self, round: int, clients: tuple[Participation, ...]) -> None:
        """Warn about clients that did not answer; invalid answers were reported on arrival."""
        for client in clients:
            said = client.status in (ClientStatus.COUNTED, ClientStatus.WITHDRAWN) or client.client in self._named
            if not said:
                self._warn_of(round, client.client, client.status, client.reason)

    def _warn_of(self, round: int, client: str, status: ClientStatus, reason: str) -> None:
        self._named[client] = reason
        because = f": {reason}" if reason else ""
        self._warn(f"round {round}: {client} not counted, {status.value}{because}")

    def _comparison_started(self, event: ComparisonStarted) -> None:
        self._awaited = dict.fromkeys(event.stores)
        stores = counted(len(event.stores), "store")
        self._say(f"{stores} now compare models; each trains one alone for that, which takes as long as all rounds did")
        self._show(f"comparing models: 0 of {stores} done")

    def _stores_compared(self, event: StoresCompared) -> None:
        for store in event.stores if len(event.stores) <= MOST_NAMED else ():
            self._store_compared(store)
        if sentence := verdict(event.stores):
            self._say(sentence, style="bold")

    def _store_compared(self, store: StoreComparison) -> None:
        if store.reason == NOT_TOLD:
            self._say(f"{store.client} has compared models; {store.reason}")
            return
        if store.best is None:
            self._warn(f"{store.client} has compared no models: {store.reason}")
            return
        self._say(f"{store.client} keeps the {store.best.value} model{figures(store.accuracies)}")

    def _run_ended(self, event: RunEnded) -> None:
        self.close()
        if event.status is RunStatus.FAILED:
            return  # the command prints the error
        best = f", best round {self._best_round}" if self._best_round is not None else ""
        reason = f": {event.reason}" if event.reason else ""
        style = "bold green" if event.status is RunStatus.FINISHED else "bold yellow"
        self._say(f"run {event.status.value}{reason}{best}", style=style)

    def _say(self, line: str, style: str = "") -> None:
        print_line(self._console, line, style=style)

    def _warn(self, line: str) -> None:
        print_line(self._console, line, label="warning: ", label_style="yellow")

    def _show(self, status: str) -> None:
        if self._bar is not None:
            self._bar.show(status)


def _some(names: Iterable[str], *, most: int | None = None, width: int | None = None) -> str:
    """Return the first `most` names, or those that fit in `width` cells, and the number of the rest."""
    names = list(names)
    for kept in range(min(most or len(names), len(names)), 0, -1):
        more = f" and {len(names) - kept} more" if kept < len(names) else ""
        text = ", ".join(names[:kept]) + more
        if width is None or cell_len(text) <= width:
            return text
    return counted(len(names), "store") if names else ""


class _Bar(Progress):
    """A status line and a progress bar of rounds at the bottom; terminals only."""

    def __init__(self, console: Console) -> None:
        self._status = Text(no_wrap=True, overflow="ellipsis")
        self._task: TaskID | None = None
        super().__init__(
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f} rounds"),
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
            transient=True,
            refresh_per_second=4,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the status line and the bar."""
        yield self._status
        yield self.make_tasks_table(self.tasks)

    def begin(self, *, total: int, done: int) -> None:
        """Show the bar."""
        if self._task is not None:
            self.remove_task(self._task)
        self._task = self.add_task("", total=total, completed=done, left="")
        self.start()

    def show(self, status: str) -> None:
        """Set the status line."""
        self._status.plain = printable(status)

    def advance_to(self, done: int, *, left: str) -> None:
        """Advance the bar."""
        if self._task is not None:
            self.update(self._task, completed=done, left=left)
