"""Handing work out to clients by name, and waiting for their answers."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from fedshelf.compression.download import Downloads
from fedshelf.core.events import ClientRefused
from fedshelf.core.messages import Broadcast, Failure, TaskKey
from fedshelf.core.ports import Clock, MetricSink, Reply, Transport
from fedshelf.rounds.inbox import POLL_SECONDS, ClientReady, Inbox
from fedshelf.rounds.membership import Membership


class Traffic(Protocol):
    """Where it is written down what asking costs: payload bytes on the wire, seen from the clients, and when each was
    (last) sent its task, in seconds of the timer."""

    bytes_up: int
    bytes_down: int
    sent: dict[str, float]


@dataclass(kw_only=True, slots=True)
class TrafficCounter:
    """A traffic of its own."""

    bytes_up: int = 0
    bytes_down: int = 0
    sent: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Dispatcher:
    """Asks clients on the ports it is given. Deadlines go by `timer`."""

    transport: Transport
    membership: Membership
    inbox: Inbox
    downloads: Downloads
    sink: MetricSink
    timer: Clock

    def dispatch(
        self, names: Iterable[str], key: TaskKey, broadcast: Callable[[str], Broadcast],
        on_reply: Callable[[Reply], None], *, seconds: float, traffic: Traffic,
        enough: Callable[[float], bool] = lambda now: False, wake: float = math.inf,
    ) -> None:  # fmt: skip
        """Send `broadcast` to each of `names` and pass their answers to `on_reply` until there is one from every client
        that is (or may yet come) live, or there are `enough`, or `seconds` have passed.

        Args:
            key: of the work; answers to other work are not used.
            traffic: what is sent and received is added to it.
            enough: of the time.
            wake: when `enough` may change though nothing has come in.

        Raises:
            StopRequested: the server was asked to stop.
        """
        now = self.timer.now()
        deadline = now + seconds
        pending: set[str] = set() if enough(now) else set(names)

        def send(name: str) -> None:
            address = self.membership.address(name)
            if address is not None:
                message = self.downloads.message(address, broadcast(name), came_with=self.membership.holds(name))
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
                        send(name)  # it was away, or is another process now: the task it was sent before is lost
                case Reply(client=name, task=task) as reply:
                    if name not in pending or task not in (key, None):
                        self.sink.emit(ClientRefused(client=name, reason="an answer to work that is closed: not used"))
                    else:
                        self._note_download(reply)
                        traffic.bytes_up += reply.num_bytes
                        pending.remove(name)
                        on_reply(reply)
            now = self.timer.now()

    def _note_download(self, reply: Reply) -> None:
        """A client that has answered holds the model that it was sent."""
        address = self.membership.address(reply.client)
        if address is not None:
            self.downloads.answered(address, failed=reply.message is None or isinstance(reply.message, Failure))

    def _may_answer(self, name: str) -> bool:
        return self.membership.address(name) is not None or name in self.membership.returning()
