"""Membership of clients: joining, the handshake, and leaving. Names belong to clients, addresses to connections."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedshelf.core import process_exit
from fedshelf.core.errors import RunError
from fedshelf.core.events import ClientExcluded, ClientJoined, ClientLeft, ClientRefused
from fedshelf.core.messages import PROTOCOL_VERSION, ClassFolder, Join, Ready, Setup
from fedshelf.core.ports import Clock, Left, MetricSink, Transport

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # in a row, of a client whose failure may be transient
MAX_PHOTOS = 10**12  # more than any store has; unbounded numbers would break sums and databases


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

    While a client is live, its name belongs to the identity that first joined under it. The same identity joining again
    (after a restart or a lost connection) replaces itself.

    Args:
        transport: sends the setup and refusals.
        sink: receives events.
        clock: measures how long to wait for returning clients.
    """

    def __init__(self, *, transport: Transport, sink: MetricSink, clock: Clock) -> None:
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
        self._failures: dict[str, int] = {}  # by name: failures in a row
        self._excluded: dict[str, str] = {}  # by name: the reason
        self._setup: Setup | None = None
        self._expected: Ready | None = None

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

    def expect(self, names: Iterable[str], seconds: float) -> None:
        """After a server restart, give clients that were live before `seconds` to return."""
        self._returning = set(names)
        self._patience_ends = self._clock.now() + seconds

    def returning(self) -> frozenset[str]:
        """Expected clients that have not returned yet; empty once the time is over."""
        return frozenset(self._returning if self._clock.now() < self._patience_ends else ())

    def missing(self) -> frozenset[str]:
        """Clients that were live before, and are now neither live nor excluded."""
        return frozenset(self._known - self._live - self._excluded.keys()) | self.returning()

    def classes(self) -> Mapping[str, tuple[ClassFolder, ...]]:
        """The class folders of all joined clients, by name."""
        return {name: member.join.classes for name, member in self._members.items()}

    def on_failed(self, name: str, reason: str, *, will_repeat: bool = False) -> None:
        """Record that a live client failed at its task.

        A client that would fail again is excluded at once, others after several failures in a row: further retries
        would only end the run for all clients.

        Args:
            name: the client.
            reason: why it failed.
            will_repeat: whether the client reports that it would fail again.
        """
        self._failures[name] = self._failures.get(name, 0) + 1
        if not will_repeat and self._failures[name] < MAX_FAILURES:
            return
        times = "" if will_repeat else f" ({self._failures[name]} times in a row)"
        self._excluded[name] = f"{reason}{times}"
        self._sink.emit(ClientExcluded(client=name, reason=self._excluded[name]))
        if name in self._members:
            self._disconnect(name, f"excluded from the run: {self._excluded[name]}. Fix that, and start it again")

    def on_counted(self, name: str) -> None:
        """Record that an upload of the client was counted."""
        self._failures.pop(name, None)

    def live(self) -> tuple[str, ...]:
        """Names of the clients that are ready for work, sorted."""
        return tuple(sorted(self._live))

    def num_live(self) -> int:
        """Number of clients that are ready for work."""
        return len(self._live)

    def names(self) -> tuple[str, ...]:
        """Names of the clients that have joined, set up or not, sorted."""
        return tuple(sorted(self._members))

    def check_any_left(self) -> None:
        """Check that not all clients have been excluded.

        Raises:
            RunError: all have; the message has each reason.
        """
        if self._excluded and not self._members:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(self._excluded.items()))
            raise RunError(f"no client is left, all were excluded. {reasons}")

    def num_joined(self) -> int:
        """Number of clients that have joined, set up or not."""
        return len(self._members)

    def address(self, name: str) -> str | None:
        """The address of `name`; None if it is not live."""
        member = self._members.get(name)
        return member.address if member and member.ready else None

    def name(self, address: str) -> str | None:
        """The client's name at `address`; None if none has joined there."""
        return self._names.get(address)

    def num_train(self, name: str) -> int:
        """Number of training photos that a live client reports."""
        member = self._members.get(name)
        return member.ready.num_train if member and member.ready else 0

    def num_validation(self, name: str) -> int:
        """Number of validation photos that a live client reports."""
        member = self._members.get(name)
        return member.ready.num_validation if member and member.ready else 0

    def holds(self, name: str) -> str:
        """The model that a live client held when it joined; "" for none."""
        member = self._members.get(name)
        return member.ready.holds if member and member.ready else ""

    def on_joined(self, address: str, join: Join) -> None:
        """Accept or refuse a client that has introduced itself."""
        problem = self._problem_with(join)
        if problem:
            self._transport.refuse(address, problem)
            self._sink.emit(ClientRefused(client=join.client, reason=problem))
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
        for what in ("run_id", "catalogue_digest", "config_digest", "layout_digest"):
            if getattr(ready, what) != getattr(self._expected, what):
                self._drop(
                    name,
                    f"its {what.replace('_', ' ')} differs from the server's: its FedShelf is of another version; "
                    "install the server's version and start 'fedshelf client' again",
                )
                return None
        if not all(0 <= count <= MAX_PHOTOS for count in (ready.num_train, ready.num_validation, ready.num_left_out)):
            self._drop(name, f"it claims to hold numbers of photos outside of 0 to {MAX_PHOTOS:,}")
            return None
        if ready.num_train < 1:
            self._drop(name, "it holds no training photo of a class in the run's catalogue")
            return None
        self._members[name].ready = ready
        self._live.add(name)
        self._known.add(name)
        self._returning.discard(name)
        self._absences.pop(name, None)
        self._excluded.pop(name, None)
        self._sink.emit(
            ClientJoined(
                client=name, num_train=ready.num_train, num_validation=ready.num_validation,
                num_left_out=ready.num_left_out,
            )
        )  # fmt: skip
        return name

    def on_setup_failed(self, address: str, reason: str) -> None:
        """Drop a client that cannot take part in this run."""
        name = self._names.get(address)
        if name is not None:
            self._drop(name, reason)

    def absence(self, name: str) -> str:
        """Why a client is not live, as far as known."""
        return self._absences.get(name, "not connected")

    def on_left(self, left: Left) -> None:
        """Forget a connection that has ended."""
        name, reason = self._names.get(left.address), "no sign of life"
        if name is None:
            return
        if left.ended_by is not None:
            reason = self._absences[name] = process_exit.ended_by(f"the process of {name}", left.ended_by)
        elif left.signed_off:
            reason = self._absences[name] = "signed off"
        self._forget(left.address, reason)
        if left.ended_by in process_exit.CRASHES:
            self.on_failed(name, reason)

    def _forget(self, address: str, reason: str) -> None:
        name = self._names.pop(address)
        del self._members[name]
        self._live.discard(name)
        self._sink.emit(ClientLeft(client=name, reason=reason))

    def _drop(self, name: str, reason: str) -> None:
        self._disconnect(name, reason)
        self._sink.emit(ClientRefused(client=name, reason=reason))

    def _disconnect(self, name: str, reason: str) -> None:
        member = self._members.pop(name)
        self._live.discard(name)
        self._names.pop(member.address, None)
        self._returning.discard(name)
        self._transport.refuse(member.address, reason)

    def _problem_with(self, join: Join) -> str | None:
        if join.protocol != PROTOCOL_VERSION:
            return (
                f"it speaks protocol {join.protocol} (FedShelf {join.version}), the server {PROTOCOL_VERSION}; "
                "install the server's version of FedShelf"
            )
        if not join.client.strip():
            return "its name is empty; start it with --name NAME"
        if not join.classes:
            return "it has no product with a usable photo; 'fedshelf data check' says why"
        if any("" in folder.path.split("/") for folder in join.classes):
            return "the path of a class folder has an empty part"
        holder = self._members.get(join.client)
        if holder is not None and holder.join.identity != join.identity:
            return f"a client named {join.client!r} is already live; give this one another with --name NAME"
        return None
