"""Membership of clients: joining, the handshake, and leaving. Names belong to clients, addresses to connections."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedshelf.core import process_exit
from fedshelf.core.class_folder import problem_with
from fedshelf.core.errors import RunError
from fedshelf.core.events import ClientExcluded, ClientJoined, ClientLeft, ClientRefused
from fedshelf.core.messages import (
    NOTHING_TO_WITHDRAW,
    PROTOCOL_VERSION,
    WITHDRAWN,
    ClassFolder,
    Join,
    Purpose,
    Ready,
    Setup,
)
from fedshelf.core.ports import Clock, Left, MetricSink, Transport
from fedshelf.core.state import ServerState, Suspension
from fedshelf.core.text import counted

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # in a row and of one kind, of a client whose failure may be transient
CANNOT_WITHDRAW = (
    "it wants to withdraw, and the algorithm of this run cannot take a store's photos out of the model: only sums can "
    "be taken out (--algorithm ridge). Train a new model without this store"
)
NO_CLASSES = (
    "it names no product, and the catalogue of this run is made of the stores' names: start the server with "
    "--catalogue FILE"
)
SUSPENDED_ROUNDS = 10  # without a client that failed so often


@dataclass(kw_only=True)
class Member:
    """A client under its accepted name.

    Attributes:
        address: its connection.
        join: its introduction.
        ready: its reply to the setup; None until it has finished setting up.
    """

    address: str
    join: Join
    ready: Ready | None = None


class Membership:
    """The live clients of a run.

    A client that joins again (after a restart or a lost connection) replaces itself. That nobody joins under another
    client's name is the transport's business.

    Args:
        transport: sends the setup and refusals.
        sink: receives events.
        clock: measures how long to wait for returning clients.
        sums: whether uploads are sums, so that clients can withdraw.
        needs_counts: the setting that needs the clients' numbers of photos; empty if none does.
        has_catalogue: whether the products are given, so that clients need not name theirs.

    Attributes:
        num_faults: failures and exclusions so far, which are finitely many in a round.
    """

    def __init__(
        self, *, transport: Transport, sink: MetricSink, clock: Clock, sums: bool = False, needs_counts: str = "",
        has_catalogue: bool = False,
    ) -> None:  # fmt: skip
        self._sums = sums
        self._needs_counts = needs_counts
        self._has_catalogue = has_catalogue
        self._transport = transport
        self._sink = sink
        self._clock = clock
        self._returning: set[str] = set()
        self._patience_ends = 0.0
        self._members: dict[str, Member] = {}
        self._live: set[str] = set()
        self._known: set[str] = set()  # all clients that were ever live
        self._names: dict[str, str] = {}  # address -> name
        self._absences: dict[str, str] = {}  # by name: why a disconnected client left, if known
        self._failures: Counter[tuple[str, Purpose]] = Counter()  # in a row, by name and kind of task
        self._refusals: dict[tuple[str, Purpose | None], str] = {}  # by name and kind of task, None for the run: why
        self._excluded: dict[str, str] = {}  # by name: the reason; until it joins again
        self._suspended: dict[str, Suspension] = {}  # by name
        self._withdrawing: set[str] = set()  # names of those that joined last to withdraw
        self._with_photos: frozenset[str] = frozenset()  # names of those that the model's sums are of
        self._round = 0
        self.num_faults = 0
        self._setup: Setup | None = None
        self._expected: Ready | None = None
        self._former: set[tuple[str, str]] = set()  # digests of catalogue and layout in earlier setups

    def open(self, setup: Setup, *, catalogue_digest: str, config_digest: str) -> None:
        """Start setting up clients, including those that have already joined.

        Args:
            setup: sent to each client.
            catalogue_digest: expected in each client's reply.
            config_digest: expected in each client's reply.
        """
        self._setup = setup
        self._expected = Ready(
            run_id=setup.run_id, layout_digest=setup.layout_digest, catalogue_digest=catalogue_digest,
            config_digest=config_digest, num_train=0, num_validation=0, num_left_out=0,
        )  # fmt: skip
        for member in self._members.values():
            self._transport.send(member.address, setup)

    def reopen(self, setup: Setup, *, catalogue_digest: str, seconds: float) -> None:
        """Set all clients up again, because the catalogue has changed.

        Args:
            setup: sent to each client.
            catalogue_digest: expected in each client's reply.
            seconds: how long a round waits for those that were live.
        """
        if self._expected is None:
            raise ValueError("no setup was opened before")
        self._former.add(self._current)
        live, config = tuple(self._live), self._expected.config_digest
        self._live.clear()
        for member in self._members.values():
            member.ready = None
        self.expect(live, seconds)
        self.open(setup, catalogue_digest=catalogue_digest, config_digest=config)

    def resume(self, state: ServerState) -> None:
        """After a server restart, remember the run's clients, and which of them are excluded."""
        self._known |= state.times_live.keys()
        self.note_photos(state.photos)
        self._suspended = dict(state.suspended)
        for name, suspension in self._suspended.items():
            self._emit_excluded(name, suspension)

    def note_photos(self, photos: Mapping[str, int]) -> None:
        """Note whose photos the model is made of, if uploads are sums."""
        self._with_photos = frozenset(photos)

    def expect(self, names: Iterable[str], seconds: float) -> None:
        """After a server restart, give clients that were live before `seconds` to return."""
        self._returning = set(names)
        self._known |= self._returning
        self._patience_ends = self._clock.now() + seconds

    def returning(self) -> frozenset[str]:
        """Expected clients that have not returned yet; empty once the time is over."""
        if not self._returning or self.seconds_to_return() <= 0:
            return frozenset()
        return frozenset(self._returning.difference(self._transport.revoked()))

    def seconds_to_return(self) -> float:
        """Seconds that expected clients still have to return."""
        return self._patience_ends - self._clock.now()

    def missing(self) -> frozenset[str]:
        """Clients that were live before, and are now neither live nor excluded nor revoked."""
        return frozenset(self._known - self._live).difference(self._out()) | self.returning()

    def classes(self) -> Mapping[str, tuple[ClassFolder, ...]]:
        """The class folders of all joined clients that do not withdraw, by name."""
        return {name: member.join.classes for name, member in self._members.items() if not member.join.withdraws}

    def excluded(self) -> Mapping[str, str]:
        """Excluded clients, for some rounds or until they join again, with the reason."""
        return {**{name: suspension.reason for name, suspension in self._suspended.items()}, **self._excluded}

    def suspended(self) -> Mapping[str, Suspension]:
        """Clients that are excluded for some rounds."""
        return dict(self._suspended)

    def num_eligible(self, num_expected: int) -> int:
        """Number of clients that can be waited for: those known or expected at first, less the excluded and revoked."""
        return max(1, max(len(self._known), num_expected) - len(self._known & self._out()))

    def begin_round(self, number: int) -> None:
        """Record that round `number` begins. Clients whose time of exclusion is over may take part in it."""
        self._round = number
        for name in [name for name, suspension in self._suspended.items() if suspension.last_round < number]:
            del self._suspended[name]
            if self.address(name) is not None:
                self._live.add(name)

    def on_failed(
        self, name: str, reason: str, *, doing: Purpose = Purpose.TRAIN, will_repeat: bool = False
    ) -> None:  # fmt: skip
        """Record that a client failed at its task.

        After several failures in a row of one kind it is excluded for some rounds: further retries would only cost the
        other clients time. One failure more is enough after its return. A client that would fail again is excluded at
        once, until it joins again.

        Args:
            name: the client.
            reason: why it failed.
            doing: the kind of task.
            will_repeat: whether the client reports that it would fail again.
        """
        self.num_faults += 1
        self._failures[name, doing] += 1
        times = self._failures[name, doing]
        if times >= MAX_FAILURES:
            self.suspend(name, f"{reason} ({times} times in a row)")
        elif will_repeat:
            self._excluded[name] = reason
            self._sink.emit(ClientExcluded(client=name, reason=reason))
        if will_repeat and name in self._members:
            is_final = self._members[name].join.withdraws
            self._disconnect(name, f"excluded from the run: {reason}", is_final=is_final)

    def on_refused(self, name: str, reason: str, *, doing: Purpose) -> None:
        """Record, once for each reason, that a client's policy does not allow a kind of task."""
        self._emit_refused(name, reason, doing)

    def on_succeeded(self, name: str, *, doing: Purpose = Purpose.TRAIN) -> None:
        """Record that the client's answer to a task of this kind was used."""
        self._failures.pop((name, doing), None)

    def suspend(self, name: str, reason: str) -> None:
        """Exclude a client for some rounds. It stays connected, and is not asked."""
        self.num_faults += 1
        self._suspended[name] = Suspension(last_round=self._round + SUSPENDED_ROUNDS, reason=reason)
        self._live.discard(name)
        self._emit_excluded(name, self._suspended[name])

    def live(self) -> tuple[str, ...]:
        """Names of the clients that are ready for work, sorted."""
        return tuple(sorted(self._live))

    def num_live(self) -> int:
        """Number of clients that are ready for work."""
        return len(self._live)

    def names(self) -> tuple[str, ...]:
        """Names of the clients that have joined, set up or not, sorted."""
        return tuple(sorted(self._members))

    def check_enough_left(self, least: int = 1) -> None:
        """Check that not too many clients have been excluded.

        Args:
            least: how many a round needs.

        Raises:
            RunError: fewer are left; the message has each reason.
        """
        excluded = self.excluded()
        num_left = len((self._members.keys() - excluded.keys()) | self.missing())
        if excluded and num_left < least:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(excluded.items()))
            left = f"{counted(num_left, 'client')} left, and rounds need {least}; the others" if num_left else ""
            raise RunError(f"{left or 'no client is left, all'} were excluded. {reasons}")

    def num_joined(self) -> int:
        """Number of clients that have joined to take part, set up or not. It is asked for with each of thousands."""
        return len(self._members) - len(self._withdrawing & self._members.keys())

    def address(self, name: str) -> str | None:
        """The address of `name`; None if it is not live."""
        member = self._members.get(name)
        return member.address if member and member.ready else None

    def name(self, address: str) -> str | None:
        """The client's name at `address`; None if none has joined there."""
        return self._names.get(address)

    def withdraws(self, name: str) -> bool:
        """Whether the client of that name joined last to withdraw."""
        return name in self._withdrawing

    def num_train(self, name: str) -> int:
        """Number of training photos that a live client reports; 1 if it withholds it."""
        member = self._members.get(name)
        if member is None or member.ready is None:
            return 0
        return 1 if member.ready.num_train is None else member.ready.num_train

    def num_validation(self, name: str) -> int:
        """Number of validation photos that a live client reports; 0 if it withholds it, and so does not evaluate."""
        member = self._members.get(name)
        return (member.ready.num_validation or 0) if member and member.ready else 0

    def holds(self, name: str) -> str:
        """The model that a live client held when it joined; "" for none."""
        member = self._members.get(name)
        return member.ready.holds if member and member.ready else ""

    def on_joined(self, address: str, join: Join) -> None:
        """Accept or refuse a client that has introduced itself."""
        problem = self._problem_with(join)
        if problem:
            # Another protocol takes another program, and no later round lets the client withdraw.
            is_final = join.protocol != PROTOCOL_VERSION or join.withdraws
            self._transport.refuse(address, problem, is_final=is_final)
            self._emit_refused(join.client, problem)
            return
        held = self._names.get(address)
        if (
            held is not None and held != join.client
        ):  # otherwise one connection could fill the run with clients that never reply
            self._forget(address, f"its connection is now {join.client!r}")
        previous = self._members.get(join.client)
        if previous is not None:
            self._names.pop(previous.address, None)
            self._live.discard(join.client)
        self._members[join.client] = Member(address=address, join=join)
        (self._withdrawing.add if join.withdraws else self._withdrawing.discard)(join.client)
        self._names[address] = join.client
        if self._setup is not None:
            self._transport.send(address, self._setup)

    def on_ready(self, address: str, ready: Ready) -> str | None:
        """Accept a client that has set up, or refuse it if its digests differ.

        Returns:
            The client's name if it is now live, otherwise None.
        """
        name = self._names.get(address)
        if name is None or self._expected is None:
            return None
        if (ready.catalogue_digest, ready.layout_digest) in self._former - {self._current}:
            return None  # its reply to the setup before; that to the newest follows
        for what in ("run_id", "catalogue_digest", "config_digest", "layout_digest"):
            if getattr(ready, what) != getattr(self._expected, what):
                self._drop(
                    name,
                    f"its {what.replace('_', ' ')} differs from the server's: its FedShelf is of another version; "
                    "install the server's version and start 'fedshelf client' again",
                    is_final=True,
                )
                return None
        if ready.num_train is None and self._needs_counts:
            self._drop(name, f"it does not tell its number of photos, which this run needs: {self._needs_counts}")
            return None
        if ready.num_train == 0 and not self._members[name].join.withdraws:
            self._drop(name, "it holds no training photo of a class in the run's catalogue")
            return None
        if self._members[name].join.withdraws and name not in self._with_photos:
            self._drop(name, NOTHING_TO_WITHDRAW, is_final=True)
            return None
        self._members[name].ready = ready
        self._known.add(name)
        self._returning.discard(name)
        self._absences.pop(name, None)
        self._excluded.pop(name, None)
        for doing in (None, *Purpose):
            self._refusals.pop((name, doing), None)
        if name in self._suspended:
            return None
        self._live.add(name)
        self._sink.emit(
            ClientJoined(
                client=name, num_train=ready.num_train, num_validation=ready.num_validation,
                num_left_out=ready.num_left_out,
            )
        )  # fmt: skip
        return name

    def on_setup_failed(self, address: str, reason: str) -> None:
        """Drop a client that cannot take part in this run. It tries again: the next run may be another."""
        name = self._names.get(address)
        if name is not None:
            self._drop(name, reason)

    def release(self, name: str, number: int) -> None:
        """Let a client go whose photos are not in the model since round `number`, which is saved."""
        self._known.discard(name)
        self._absences[name] = reason = "withdrawn: its photos are no longer in the model"
        if name in self._members:
            self._disconnect(name, f"{WITHDRAWN}, as of round {number}", is_final=True)
            self._sink.emit(ClientLeft(client=name, reason=reason))

    def absence(self, name: str) -> str:
        """Why a client is not live, as far as known."""
        if name in self._transport.revoked():
            return _revoked(name)
        if name in self._suspended:
            return f"excluded: {self._suspended[name].reason}"
        return self._absences.get(name, "not connected")

    def on_left(self, left: Left) -> None:
        """Forget a connection that has ended."""
        name, reason = self._names.get(left.address), "no sign of life"
        if name is None:
            return
        if name in self._transport.revoked():
            reason = _revoked(name)
        elif left.ended_by is not None:
            reason = self._absences[name] = process_exit.ended_by(f"the process of {name}", left.ended_by)
        elif left.signed_off:
            reason = self._absences[name] = "signed off"
        self._forget(left.address, reason)
        if left.ended_by in process_exit.CRASHES:
            self.on_failed(name, reason)

    @property
    def _current(self) -> tuple[str, str]:
        return ("", "") if self._expected is None else (self._expected.catalogue_digest, self._expected.layout_digest)

    def _out(self) -> set[str]:
        return {*self.excluded(), *self._transport.revoked()}

    def _forget(self, address: str, reason: str) -> None:
        name = self._names.pop(address)
        del self._members[name]
        self._live.discard(name)
        self._sink.emit(ClientLeft(client=name, reason=reason))

    def _emit_excluded(self, name: str, suspension: Suspension) -> None:
        self._sink.emit(ClientExcluded(client=name, reason=suspension.reason, last_round=suspension.last_round))

    def _emit_refused(self, name: str, reason: str, doing: Purpose | None = None) -> None:
        """Report a refusal once, however often the client tries again."""
        if self._refusals.get((name, doing)) != reason:
            self._refusals[name, doing] = reason
            self._sink.emit(ClientRefused(client=name, reason=reason))

    def _drop(self, name: str, reason: str, *, is_final: bool = False) -> None:
        self._disconnect(name, reason, is_final=is_final)
        self._absences[name] = f"refused: {reason}"
        self._emit_refused(name, reason)

    def _disconnect(self, name: str, reason: str, *, is_final: bool = False) -> None:
        member = self._members.pop(name)
        self._live.discard(name)
        self._names.pop(member.address, None)
        self._returning.discard(name)
        self._transport.refuse(member.address, reason, is_final=is_final)

    def _problem_with(self, join: Join) -> str | None:
        if join.protocol != PROTOCOL_VERSION:
            return (
                f"it speaks protocol {join.protocol} (FedShelf {join.version}), the server {PROTOCOL_VERSION}; "
                "install the server's version of FedShelf"
            )
        if not join.client.strip():
            return "its name is empty; start it with --name NAME"
        if join.withdraws:
            return None if self._sums else CANNOT_WITHDRAW
        if not join.classes:
            return None if self._has_catalogue else NO_CLASSES
        return problem_with(join.classes) or None


def _revoked(name: str) -> str:
    return f"store {name} was revoked"
