"""A transport to simulated clients that delivers answers in the order of virtual time.

A task's end is known when it is sent, so its answer is computed as soon as a worker is free and delivered when the
clock reaches that end. The clock never waits: it stands still while answers are computed, and otherwise jumps to the
next event.
"""

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import replace

from fedshelf.core.errors import FedShelfError, RunError
from fedshelf.core.messages import Broadcast, ClientMessage, Join, Purpose, Ready, ServerMessage, TaskKey
from fedshelf.core.ports import Arrival, Joined, Left, Reply
from fedshelf.core.state import ServerState
from fedshelf.simulate.client_runner import Backend
from fedshelf.simulate.event_queue import EventKind, EventQueue, SimulatedTask
from fedshelf.simulate.simulated_wire import Wire
from fedshelf.simulate.virtual import Dropout, Durations

NOTHING_CAN_ARRIVE = (
    "the run waits for more clients than can take part: all simulated ones have answered. Those that were refused or "
    "excluded are named above; else there are fewer stores than --min-clients or --quorum"
)


class VirtualTimeTransport:
    """`Transport` in virtual time, and its `VirtualClock`. Clients' names serve as their addresses.

    Args:
        backend: runs the clients.
        joins: the `Join` of each client; all join at the start.
        durations: task durations in virtual seconds.
        dropout: when clients drop out; tasks that they abandon are not computed.
        together: compute all started tasks before delivering an answer, because which clients are computed together
            affects the last bits; otherwise wait for answers one by one.
    """

    def __init__(
        self, backend: Backend, joins: Iterable[Join], durations: Durations, dropout: Dropout, *, together: bool = False
    ) -> None:  # fmt: skip
        self._backend = backend
        self._introductions = {join.client: join for join in joins}
        self._joins = deque(self._introductions)
        self._durations = durations
        self._dropout = dropout
        self._together = together
        self._events = EventQueue()
        self._wire = Wire()
        self._num_train: dict[str, int] = {}
        self._given: dict[str, tuple[TaskKey, int]] = {}  # the newest training, and how often it was sent before
        self._at_work: set[str] = set()
        self._answers: dict[str, ClientMessage] = {}  # computed ahead of time: at most one per client

    def send(self, address: str, message: ServerMessage) -> int:
        """See `Transport`."""
        if self._events.is_away(address):
            return 0
        message, num_bytes = self._wire.down(address, message)
        seconds = self._durations.seconds(address, message, self._num_train.get(address, 0))
        self._events.push(address, message, seconds=seconds, missing=self._missing(address, message))
        self._compute()
        return num_bytes

    def receive(self, timeout: float) -> Arrival | None:
        """See `Transport`; `timeout` is in virtual seconds.

        Raises:
            RunError: no answer can arrive any more, so waiting would never end.
        """
        if self._joins:
            return self._joined(self._joins.popleft())
        if self._events.is_empty():
            raise RunError(NOTHING_CAN_ARRIVE)
        event = self._events.advance(timeout)
        if event is None:
            return None
        client = event.task.client
        match event.what:
            case EventKind.ANSWERED:
                message = self._answer_of(client)
                self._compute()
                return self._reply(event.task, message)
            case EventKind.LEFT:
                return Left(address=client)
            case EventKind.JOINED:
                return self._joined(client)
            case EventKind.NOTHING:
                self._compute()
        return None

    def refuse(self, address: str, reason: str, *, is_final: bool = False) -> None:
        """Do nothing: the round records the refusal, and a simulated client does not need it."""

    def revoked(self) -> Collection[str]:
        """See `Transport`."""
        return ()

    def close(self, reason: str) -> None:
        """Do nothing: simulated clients end with the simulation."""

    def now(self) -> float:
        """See `VirtualClock`."""
        return self._events.now

    def is_settled(self) -> bool:
        """See `VirtualClock`."""
        return not self._joins and self._events.is_settled()

    def resume(self, state: ServerState) -> None:
        """See `VirtualClock`."""
        self._events.resume(state.virtual_seconds, state.in_flight)
        self._joins = deque(name for name in self._introductions if not self._events.is_away(name))

    def snapshot(self, state: ServerState) -> ServerState:
        """See `VirtualClock`."""
        wanted = {(flight.client, flight.key) for flight in state.in_flight if flight.wanted}
        at_work = self._events.in_flight()
        flights = tuple(replace(flight, wanted=(flight.client, flight.key) in wanted) for flight in at_work)
        return replace(state, virtual_seconds=self._events.now, in_flight=flights)

    def _missing(self, client: str, message: ServerMessage) -> float | None:
        if not isinstance(message, Broadcast) or message.purpose is not Purpose.TRAIN:
            return None
        key, times = self._given.get(client, (None, 0))
        repetition = times + 1 if key == message.key else 0
        self._given[client] = message.key, repetition
        return self._dropout.missing(client, message.key, repetition)

    def _compute(self) -> None:
        """Submit the started tasks to the backend."""
        for task in self._events.begun():
            if task.message is not None:
                self._at_work.add(task.client)
                self._backend.submit(task.client, task.message)
                task.message = None

    def _answer_of(self, client: str) -> ClientMessage:
        """Return the client's answer; wait until it is computed."""
        while client not in self._answers:
            self._collect_next()
            while self._together and self._at_work:
                self._collect_next()
        return self._answers.pop(client)

    def _collect_next(self) -> None:
        finished = self._backend.next()
        if finished is None:
            raise FedShelfError(f"no answer of {', '.join(sorted(self._at_work))} will ever be computed")
        name, answer = finished
        self._answers[name] = answer
        self._at_work.discard(name)

    def _reply(self, task: SimulatedTask, message: ClientMessage) -> Reply:
        if isinstance(message, Ready):
            self._num_train[task.client] = message.num_train or 0
        return Reply(address=task.client, message=message, num_bytes=self._wire.up(message), task=task.key)

    def _joined(self, client: str) -> Joined:
        return Joined(address=client, join=self._introductions[client])
