"""Dispatching tasks to clients by name, and receiving replies.

The `Inbox` handles joins, handshakes and departures; replies to tasks are passed on by name.
"""

import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

from fedshelf.compression.download import Downloads
from fedshelf.core.errors import FedShelfError
from fedshelf.core.events import ClientRefused, Waiting
from fedshelf.core.messages import (
    Broadcast,
    EncryptionReply,
    EncryptionRequest,
    Failure,
    Join,
    MaskingReply,
    MaskingRequest,
    Ready,
    TaskKey,
)
from fedshelf.core.ports import Clock, Joined, Left, MetricSink, Reply, Transport
from fedshelf.rounds.membership import Membership
from fedshelf.rounds.validation import MAX_REASON_CHARACTERS

FIRST_NOTICE_SECONDS, LAST_NOTICE_SECONDS = 10.0, 600.0  # between notices that the server waits
POLL_SECONDS = 1.0  # how long to wait for an arrival before checking the clock and stop requests


class StopRequested(FedShelfError):
    """The server was asked to stop. The last checkpoint remains valid."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientReady:
    """A client is ready for work, for the first time or again."""

    client: str


Task: TypeAlias = Broadcast | MaskingRequest | EncryptionRequest
Arrived: TypeAlias = Reply | ClientReady


class WaitNotice:
    """Reports that the server waits: first after some seconds, then at doubling intervals.

    Args:
        sink: receives the events.
        membership: tracks the clients.
        clock: a real-time clock; None disables notices (a simulation computes while it waits).
    """

    def __init__(self, sink: MetricSink, membership: Membership, clock: Clock | None) -> None:
        self._sink = sink
        self._membership = membership
        self._clock = clock
        self._started = clock.now() if clock else 0.0
        self._interval = FIRST_NOTICE_SECONDS
        self._due = self._started + self._interval

    def check(self, what: str, *, live: Iterable[str], missing: Iterable[str]) -> None:
        """Emit `Waiting` if it is due.

        Args:
            what: what the server waits for, as a phrase.
            live: connected clients.
            missing: clients awaited by name.
        """
        now = self._clock.now() if self._clock else 0.0
        if self._clock is None or now < self._due:
            return
        seconds = now - self._started
        returning = tuple(sorted(self._membership.returning()))
        self._sink.emit(
            Waiting(
                what=what, live=tuple(live), missing=tuple(sorted(missing)), seconds=seconds, returning=returning,
                seconds_to_return=self._membership.seconds_to_return() if returning else 0.0,
            )
        )  # fmt: skip
        self._interval = min(2 * self._interval, LAST_NOTICE_SECONDS)
        self._due = now + self._interval


class Inbox:
    """Turns arrivals into replies of known clients.

    Args:
        transport: receives arrivals.
        membership: tracks the clients.
        sink: receives events.
        stop: set to request a stop.
        clock: measures how long a wait has taken; None disables notices.
    """

    def __init__(
        self, *, transport: Transport, membership: Membership, sink: MetricSink, stop: threading.Event,
        clock: Clock | None = None,
    ) -> None:  # fmt: skip
        self._clock = clock
        self._transport = transport
        self._membership = membership
        self._sink = sink
        self._stop = stop

    def wait(self, is_over: Callable[[], bool], what: str, missing: Callable[[], Iterable[str]] = tuple) -> None:
        """Handle arrivals until `is_over`, and report at growing intervals what the server waits for.

        Args:
            is_over: checked after each arrival.
            what: what the server waits for, as a phrase.
            missing: returns the clients awaited by name.

        Raises:
            StopRequested: the server was asked to stop.
        """
        notice = self.notice()
        while not is_over():
            self.poll(POLL_SECONDS)
            notice.check(what, live=self._membership.names(), missing=missing())

    def wait_for_returning(self) -> None:
        """After a server restart, wait for the clients that took part before, or until their time is over."""
        returning = self._membership.returning
        self.wait(lambda: not returning(), "stores to return", returning)

    def notice(self) -> WaitNotice:
        """A notice for a wait that starts now."""
        return WaitNotice(self._sink, self._membership, self._clock)

    def poll(self, timeout: float) -> Reply | ClientReady | None:
        """Handle the next arrival within `timeout` seconds.

        Returns:
            A known client's reply to a task, or a client that became ready; None if there was no arrival, or it needs
            no further handling.

        Raises:
            StopRequested: the server was asked to stop.
        """
        if self._stop.is_set():
            raise StopRequested
        match self._transport.receive(timeout):
            case Joined(address=address, join=join):
                self._membership.on_joined(address, join)
            case Left() as left:
                self._membership.on_left(left)
            case Reply() as reply:
                return self._on_reply(reply)
        return None

    def _on_reply(self, reply: Reply) -> Reply | ClientReady | None:
        match reply.message:
            case None if reply.task is None and self._membership.name(reply.address):
                # Besides tasks, a joined client only answers the setup. Without this it would wait forever.
                reason = f"its answer to the setup cannot be read: {reply.reason[:MAX_REASON_CHARACTERS]}"
                self._membership.on_setup_failed(reply.address, reason)
                return None
            case Join() as join:
                self._membership.on_joined(reply.address, join)
                return None
            case Ready() as ready:
                name = self._membership.on_ready(reply.address, ready)
                return ClientReady(client=name) if name else None
            case Failure(key=None, reason=reason):
                self._membership.on_setup_failed(reply.address, reason[:MAX_REASON_CHARACTERS])
                return None
            case Failure() as failure:
                failure = replace(failure, reason=failure.reason[:MAX_REASON_CHARACTERS])
                reply = replace(reply, message=failure)
        reply = replace(reply, reason=reply.reason[:MAX_REASON_CHARACTERS])
        name = self._membership.name(reply.address)
        if name is None:
            self._sink.emit(
                ClientRefused(client=reply.address, reason="an answer from a connection that has not joined")
            )
            return None
        return replace(reply, client=name)


class Patience:
    """Bounds a phase by the time that half of its clients take: a silent one does not cost the whole time limit.

    Args:
        num_asked: number of clients asked.
        factor: multiple of the time in which half of them replied that the others have.
        at_least: seconds that they have in addition.
        timer: clock for deadlines.
    """

    def __init__(self, num_asked: int, *, factor: float, at_least: float, timer: Clock) -> None:
        self._num_half = (num_asked + 1) // 2
        self._factor = factor
        self._at_least = at_least
        self._timer = timer
        self._began = timer.now()
        self._num_replies = 0
        self._ends = math.inf

    def on_reply(self) -> None:
        """Record a reply."""
        self._num_replies += 1
        if self._num_replies == self._num_half:
            self._ends = self._began + self._factor * (self._timer.now() - self._began) + self._at_least

    def is_over(self, now: float) -> bool:
        """Whether the remaining clients have had time enough."""
        return now >= self._ends


class Traffic(Protocol):
    """Records the traffic of a dispatch.

    Attributes:
        bytes_up: payload sent by clients.
        bytes_down: payload sent to clients.
        sent: by client, when its task was last sent, in seconds of the timer.
    """

    bytes_up: int
    bytes_down: int
    sent: dict[str, float]


@dataclass(kw_only=True, slots=True)
class TrafficCounter:
    """A standalone traffic record."""

    bytes_up: int = 0
    bytes_down: int = 0
    sent: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Dispatcher:
    """Dispatches tasks and waits for the replies.

    Attributes:
        transport: sends the tasks.
        membership: tracks the clients.
        inbox: receives the replies.
        downloads: encodes the model for each client.
        sink: receives events.
        timer: clock for deadlines.
    """

    transport: Transport
    membership: Membership
    inbox: Inbox
    downloads: Downloads
    sink: MetricSink
    timer: Clock

    def dispatch(
        self, names: Iterable[str], key: TaskKey, task: Callable[[str], Task],
        on_reply: Callable[[Reply], None], *, seconds: float, traffic: Traffic,
        enough: Callable[[float], bool] = lambda now: False, wake: float = math.inf, expects_others: bool = False,
        answers: Callable[[Reply], bool] = lambda reply: True,
        others: Callable[[Arrived], None] | None = None,
    ) -> None:  # fmt: skip
        """Send each client its task and wait for the replies.

        Returns when all clients that are live or may still return have replied, there are `enough` replies, or
        `seconds` have passed.

        Args:
            names: the clients.
            key: the task; replies to other tasks are not used.
            task: makes the task for a client.
            on_reply: called with each reply.
            seconds: time limit.
            traffic: updated with what is sent and received.
            enough: whether there are enough replies at a given time.
            wake: when to check `enough` again even without arrivals.
            expects_others: whether answers to other work are expected, and dropped without a report.
            answers: whether a reply that names the task answers this message of it. Late ones to earlier messages are
                dropped.
            others: called with answers to other work and other clients that are ready; None: they are dropped.

        Raises:
            StopRequested: the server was asked to stop.
        """
        now = self.timer.now()
        deadline = now + seconds
        pending: set[str] = set() if enough(now) else set(names)

        def send(name: str) -> None:
            address = self.membership.address(name)
            if address is not None:
                message = task(name)
                if isinstance(message, Broadcast):
                    message = self.downloads.message(address, message, held_at_join=self.membership.holds(name))
                traffic.bytes_down += self.transport.send(address, message)
                traffic.sent[name] = self.timer.now()

        for name in sorted(pending):
            send(name)
        notice = self.inbox.notice()
        while now < deadline and not enough(now) and any(self._may_answer(name) for name in pending):
            notice.check(f"answers to round {key.round}", live=self.membership.names(), missing=pending)
            moments = (now + POLL_SECONDS, deadline, wake)
            match self.inbox.poll(min(moment - now for moment in moments if moment > now)):
                case ClientReady(client=name):
                    if name in pending:
                        send(name)  # it was away or has restarted: its previous task is lost
                    elif others is not None:
                        others(ClientReady(client=name))
                case Reply(client=name, task=answered) as reply:
                    if name not in pending or answered not in (key, None):
                        if others is not None:
                            others(reply)
                        elif not expects_others and not isinstance(reply.message, MaskingReply | EncryptionReply):
                            # A late share that opens a sum is not needed any more, and is no one's fault.
                            refused = ClientRefused(client=name, reason="an answer to work that is closed: not used")
                            self.sink.emit(refused)
                    elif answers(reply):
                        self._note_download(reply)
                        traffic.bytes_up += reply.num_bytes
                        pending.remove(name)
                        on_reply(reply)
            now = self.timer.now()

    def _note_download(self, reply: Reply) -> None:
        """Confirm the download: a client that replies holds the model that it was sent."""
        address = self.membership.address(reply.client)
        if address is not None and not isinstance(reply.message, MaskingReply | EncryptionReply):
            self.downloads.confirm(address, failed=reply.message is None or isinstance(reply.message, Failure))

    def _may_answer(self, name: str) -> bool:
        return self.membership.address(name) is not None or name in self.membership.returning()
