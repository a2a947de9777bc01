"""Where arrivals are received: joins, handshakes and departures are handled here; replies are passed on by name."""

import threading
from dataclasses import dataclass, replace

from fedshelf.core.errors import FedShelfError
from fedshelf.core.events import ClientRefused
from fedshelf.core.messages import Failure, Join, Ready
from fedshelf.core.ports import Joined, Left, MetricSink, Reply, Transport
from fedshelf.rounds.membership import Membership

MAX_REASON_CHARACTERS = 2000  # of a client's own words: they are written down and shown
POLL_SECONDS = 1.0  # how long to wait for an arrival before looking at the clock, and for a request to stop


class StopRequested(FedShelfError):
    """Somebody asked the server to stop; the last checkpoint stands."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientReady:
    """A client is (again) ready to be asked."""

    client: str


class Inbox:
    """Turns arrivals into replies of known clients."""

    def __init__(
        self, *, transport: Transport, membership: Membership, sink: MetricSink, stop: threading.Event
    ) -> None:
        self._transport = transport
        self._membership = membership
        self._sink = sink
        self._stop = stop

    def poll(self, timeout: float) -> Reply | ClientReady | None:
        """Handle the next arrival within `timeout` seconds.

        Returns:
            A known client's reply to a task, or that a client is ready; None if there was no arrival, or nobody needs
            to know of it.

        Raises:
            StopRequested: the server was asked to stop.
        """
        if self._stop.is_set():
            raise StopRequested("stopped on request; start the same command again to go on")
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
            case Failure(key=key, reason=reason):
                reply = replace(reply, message=Failure(key=key, reason=reason[:MAX_REASON_CHARACTERS]))
        name = self._membership.name(reply.address)
        if name is None:
            self._sink.emit(
                ClientRefused(client=reply.address, reason="an answer from a connection that has not joined")
            )
            return None
        return replace(reply, client=name)
