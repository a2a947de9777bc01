"""Where arrivals are received: joins, handshakes and departures are dealt with here; answers are handed on by name."""

import threading
from dataclasses import dataclass
from typing import TypeAlias

from fedshelf.core.errors import FedShelfError
from fedshelf.core.events import ClientRefused
from fedshelf.core.messages import Comparison, CompressedUpload, Evaluation, Failure, Join, Ready, TaskKey, Upload
from fedshelf.core.ports import Joined, Left, MetricSink, Received, Reply, Transport, Undecodable
from fedshelf.rounds.membership import Membership

Work: TypeAlias = Upload | CompressedUpload | Evaluation | Comparison | Failure
"""What a client answers to a task."""

MAX_REASON_CHARACTERS = 2000  # of a client's own words: they are written down and shown
POLL_SECONDS = 1.0  # how long to wait for an arrival before looking at the clock, and for a request to stop


class StopRequested(FedShelfError):
    """Somebody asked the server to stop; the last checkpoint stands."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answer:
    """A live client's answer to a task; `message` is None where its bytes could not be read, and `reason` says why."""

    client: str
    message: Work | None
    reason: str
    num_bytes: int
    task: TaskKey | None
    source: Received | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientReady:
    """A client is (again) ready to be asked."""

    client: str


class Inbox:
    """Turns arrivals into answers of known clients."""

    def __init__(
        self, *, transport: Transport, membership: Membership, sink: MetricSink, stop: threading.Event
    ) -> None:
        self._transport = transport
        self._membership = membership
        self._sink = sink
        self._stop = stop

    def poll(self, timeout: float) -> Answer | ClientReady | None:
        """Handle the next arrival within `timeout` seconds; None if it was none, or nobody needs to know of it.

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
            case Undecodable(address=address, reason=reason, task=None) if self._membership.name(address):
                # Of all that is no task only the setup is answered by who has joined: it would wait for ever.
                self._membership.on_setup_failed(address, f"its answer to the setup cannot be read: {reason}")
            case Undecodable(address=address, reason=reason, num_bytes=num_bytes, task=task):
                return self._answer(address, None, reason, num_bytes, task)
        return None

    def _on_reply(self, reply: Reply) -> Answer | ClientReady | None:
        match reply.message:
            case Join() as join:
                self._membership.on_joined(reply.address, join)
            case Ready() as ready:
                name = self._membership.on_ready(reply.address, ready)
                return ClientReady(client=name) if name else None
            case Failure(key=None, reason=reason):
                self._membership.on_setup_failed(reply.address, reason[:MAX_REASON_CHARACTERS])
            case Failure(key=key, reason=reason):
                failure = Failure(key=key, reason=reason[:MAX_REASON_CHARACTERS])
                return self._answer(reply.address, failure, "", reply.num_bytes, reply.task)
            case message:
                return self._answer(reply.address, message, "", reply.num_bytes, reply.task, reply.source)
        return None

    def _answer(
        self, address: str, message: Work | None, reason: str,
        num_bytes: int, task: TaskKey | None, source: Received | None = None,
    ) -> Answer | None:  # fmt: skip
        name = self._membership.name(address)
        if name is None:
            self._sink.emit(ClientRefused(client=address, reason="an answer from a connection that has not joined"))
            return None
        return Answer(client=name, message=message, reason=reason, num_bytes=num_bytes, task=task, source=source)
