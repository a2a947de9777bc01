"""In-memory fakes of the ports, with a clock that stands still unless something waits.

`Spool` has a real in-memory adapter (`storage.spool.MemorySpool`): tests use that.
"""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from fedshelf.core.events import Event
from fedshelf.core.messages import Broadcast, ClientMessage, Join, ServerMessage, TaskKey, task_key
from fedshelf.core.ports import Arrival, Joined, Left, Reply
from fedshelf.core.state import ClientState, OpenRound, ServerState
from fedshelf.serialization import blob as blobs
from fedshelf.serialization import messages as payload

E = TypeVar("E")


class FakeClock:
    """Seconds since the start of the test, moved by hand or by whoever waits."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


class RecordingSink:
    """Keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type[E]) -> list[E]:
        """The events of one kind, in order."""
        return [event for event in self.events if isinstance(event, kind)]


class FakeCheckpoints:
    """Copies, so that what is loaded is what was saved, whatever happened to the vectors since."""

    def __init__(self) -> None:
        self.states: list[ServerState] = []
        self.best: ServerState | None = None
        self.open_round: OpenRound | None = None

    def load(self) -> ServerState | None:
        return _copy(self.states[-1]) if self.states else None

    def load_round(self, round: int) -> ServerState | None:
        return next((_copy(state) for state in reversed(self.states) if state.round == round), None)

    def save(self, state: ServerState, *, is_best: bool, alone: bool = False) -> None:
        self.states = [*([] if alone else self.states), _copy(state)]
        if is_best:
            self.best = _copy(state)

    def load_open_round(self) -> OpenRound | None:
        return self.open_round

    def save_open_round(self, open_round: OpenRound) -> None:
        self.open_round = open_round

    def forget_noise_key(self) -> None:
        if self.open_round is not None:
            self.open_round = replace(self.open_round, noise_key=None)


def _copy(state: ServerState) -> ServerState:
    optimizer = {name: vector.clone() for name, vector in state.model.optimizer.items()}
    return replace(state, model=replace(state.model, params=state.model.params.clone(), optimizer=optimizer))


@dataclass(kw_only=True)
class _Kept:
    """A staged reply and the state that it leads to."""

    key: TaskKey
    state: ClientState
    upload: ClientMessage


class MemoryClientStates:
    """`ClientStates` by the rules of `storage.client_states`, in memory."""

    def __init__(self) -> None:
        self._committed: dict[str, ClientState] = {}
        self._pending: dict[str, _Kept] = {}

    def commit_or_rollback(self, broadcast: Broadcast) -> ClientState:
        run_id = broadcast.key.run_id
        pending = self._pending.get(run_id)
        if pending is not None and pending.key == broadcast.counted:
            self._committed[run_id] = pending.state
            del self._pending[run_id]
        elif pending is not None and pending.key != broadcast.key:
            del self._pending[run_id]
        return self._committed.get(run_id, ClientState())

    def peek(self, key: TaskKey) -> ClientState:
        pending = self._pending.get(key.run_id)
        if pending is not None and pending.key == key:
            return pending.state
        return self._committed.get(key.run_id, ClientState())

    def cached_reply(self, key: TaskKey) -> ClientMessage | None:
        pending = self._pending.get(key.run_id)
        return pending.upload if pending is not None and pending.key == key else None

    def stage(self, key: TaskKey, upload: ClientMessage, state: ClientState) -> None:
        self._pending[key.run_id] = _Kept(key=key, state=state, upload=upload)


@dataclass(frozen=True)
class Garbled:
    """An answer whose bytes cannot be read."""

    reason: str = "the message is truncated"


@dataclass(frozen=True)
class Gone:
    """The connection is lost instead of an answer."""


Answer = ClientMessage | Garbled | Gone | None
"""What a fake client does about a message; None is silence."""


@dataclass
class FakePeer:
    """A client at the other end of the line: who it says it is, what it answers, and how many seconds that takes:
    `delay`, and what `work` adds for the answer just given."""

    join: Join
    answer: Callable[[ServerMessage], Answer]
    delay: float = 0.0
    address: str = ""
    work: Callable[[], float] = lambda: 0.0

    def __post_init__(self) -> None:
        self.address = self.address or f"line-to-{self.join.client}"


@dataclass(order=True)
class _Due:
    at: float
    tiebreak: float
    number: int
    arrival: Arrival = field(compare=False)


class FakeTransport:
    """Carries messages to fake clients, through the wire's own encoding, and back in a scripted order.

    Args:
        clock: moved to the next arrival by whoever waits for one.
        order: draws the order of what arrives at the same moment; None: first come, first served.
    """

    def __init__(self, clock: FakeClock, order: random.Random | None = None) -> None:
        self._clock = clock
        self._order = order
        self._peers: dict[str, FakePeer] = {}
        self._due: list[_Due] = []
        self._count = 0
        self.sent: list[tuple[str, ServerMessage]] = []
        self.refused: dict[str, str] = {}
        self.final_refusals: set[str] = set()
        self._revoked: set[str] = set()
        self.closed: str | None = None

    def connect(self, peer: FakePeer, *, delay: float = 0.0) -> None:
        """`peer` introduces itself, `delay` seconds from now; one at the same address is gone."""
        self._peers[peer.address] = peer
        self.arrive(Joined(address=peer.address, join=peer.join), delay=delay)

    def arrive(self, arrival: Arrival, *, delay: float = 0.0) -> None:
        """Let anything arrive, `delay` seconds from now."""
        self._count += 1
        tiebreak = self._order.random() if self._order else 0.0
        heapq.heappush(self._due, _Due(self._clock.now() + delay, tiebreak, self._count, arrival))

    def send(self, address: str, message: ServerMessage) -> int:
        body = payload.blob_of(message).join()
        header = payload.encode_header(message, blobs.digest(body))
        self.sent.append((address, message))
        peer = self._peers.get(address)
        if peer is not None:
            received = payload.decode(header, body)
            self._reply(peer, peer.answer(received), task_key(message))  # type: ignore[arg-type]
        return len(header.encode()) + len(body)

    def receive(self, timeout: float) -> Arrival | None:
        if not self._due or self._due[0].at > self._clock.now() + timeout:
            self._clock.advance(timeout)
            return None
        due = heapq.heappop(self._due)
        self._clock.advance(max(0.0, due.at - self._clock.now()))
        return due.arrival

    def refuse(self, address: str, reason: str, *, is_final: bool = False) -> None:
        self.refused[address] = reason
        self.final_refusals |= {address} if is_final else set()
        self._peers.pop(address, None)

    def revoke(self, name: str) -> None:
        """Revoke the client `name`, whose connection ends."""
        self._revoked.add(name)
        if self._peers.pop(f"line-to-{name}", None):
            self.arrive(Left(address=f"line-to-{name}"))

    def revoked(self) -> frozenset[str]:
        return frozenset(self._revoked)

    def close(self, reason: str) -> None:
        self.closed = reason

    def broadcasts(self, address: str | None = None) -> list[Broadcast]:
        """The tasks that were sent (to one address), in order."""
        return [m for to, m in self.sent if isinstance(m, Broadcast) and address in (None, to)]

    def downloads(self, address: str) -> list[Broadcast]:
        """The compressed tasks that were sent to one address, in order."""
        return [m for to, m in self.sent if isinstance(m, Broadcast) and not m.is_plain and to == address]

    def _reply(self, peer: FakePeer, answer: Answer, task: TaskKey | None) -> None:
        match answer:
            case None:
                return
            case Gone():
                del self._peers[peer.address]
                self.arrive(Left(address=peer.address), delay=peer.delay)
            case Garbled(reason=reason):
                garbled = Reply(address=peer.address, message=None, reason=reason, num_bytes=3, task=task)
                self.arrive(garbled, delay=peer.delay)
            case message:
                reply = Reply(address=peer.address, message=message, num_bytes=sum(payload.size(message)), task=task)
                self.arrive(reply, delay=peer.delay + peer.work())
