"""Where arrivals are received: joins, handshakes and departures are handled here; replies are passed on by name."""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from fedshelf.core.errors import FedShelfError
from fedshelf.core.events import ClientRefused, Waiting
from fedshelf.core.messages import Failure, Join, Ready
from fedshelf.core.ports import Clock, Joined, Left, MetricSink, Reply, Transport
from fedshelf.rounds.membership import Membership

MAX_REASON_CHARACTERS = 2000  # of a client's own words: they are written down and shown
FIRST_NOTICE_SECONDS, LAST_NOTICE_SECONDS = 10.0, 600.0  # between notices of what the server waits for
POLL_SECONDS = 1.0  # how long to wait for an arrival before looking at the clock, and for a request to stop


class StopRequested(FedShelfError):
    """Somebody asked the server to stop; the last checkpoint stands."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientReady:
    """A client is (again) ready to be asked."""

    client: str


class WaitNotice:
    """Says that the server waits: first after some seconds, then each time that has doubled.

    Args:
        sink: told of it.
        clock: in real time; None: nothing is said (a simulation computes while it waits).
    """

    def __init__(self, sink: MetricSink, clock: Clock | None) -> None:
        self._sink = sink
        self._clock = clock
        self._started = clock.now() if clock else 0.0
        self._interval = FIRST_NOTICE_SECONDS
        self._due = self._started + self._interval

    def check(self, what: str, *, live: Iterable[str], missing: Iterable[str]) -> None:
        """Emit `Waiting` if it is time to."""
        now = self._clock.now() if self._clock else 0.0
        if self._clock is None or now < self._due:
            return
        seconds = now - self._started
        self._sink.emit(Waiting(what=what, live=tuple(live), missing=tuple(sorted(missing)), seconds=seconds))
        self._interval = min(2 * self._interval, LAST_NOTICE_SECONDS)
        self._due = now + self._interval


class Inbox:
    """Turns arrivals into replies of known clients. `clock` tells how long a wait has taken."""

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
        """Handle arrivals until `is_over`, and say at growing intervals what is awaited.

        Args:
            is_over: looked at after each arrival.
            what: a phrase for a person.
            missing: clients that are awaited by name.

        Raises:
            StopRequested: the server was asked to stop.
        """
        notice = self.notice()
        while not is_over():
            self.poll(POLL_SECONDS)
            notice.check(what, live=self._membership.names(), missing=missing())

    def notice(self) -> WaitNotice:
        """For a wait that begins now."""
        return WaitNotice(self._sink, self._clock)

    def poll(self, timeout: float) -> Reply | ClientReady | None:
        """Handle the next arrival within `timeout` seconds.

        Returns:
            A known client's reply to a task, or that a client is ready; None if there was no arrival, or nobody needs
            to know of it.

        Raises:
            StopRequested: the server was asked to stop.
        """
        if self._stop.is_set():
            raise StopRequested("stopped on request; start the same command again to resume")
        match self._transport.receive(timeout):
            case Joined(address=address, join=join):
                self._membership.on_joined(address, join)
            case Left(address=address, ended_by=by):
                self._membership.on_left(address, "no sign of life", ended_by=by)
            case Reply() as reply:
                return self._on_reply(reply)
        return None

    def _on_reply(self, reply: Reply) -> Reply | ClientReady | None:
        match reply.message:
            case None if reply.task is None and self._membership.name(reply.address):
                # Of all messages that are no task a joined client answers only the setup: it would wait forever.
                reason = f"its answer to the setup cannot be read: {reply.reason}"
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
        name = self._membership.name(reply.address)
        if name is None:
            self._sink.emit(
                ClientRefused(client=reply.address, reason="an answer from a connection that has not joined")
            )
            return None
        return replace(reply, client=name)
