"""The rounds' transport without a network: messages go to a backend that plays the clients."""

from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

from fedshelf.core.errors import RunError
from fedshelf.core.messages import ClientMessage, Join, Ready, ServerMessage, TaskKey, task_key
from fedshelf.core.ports import Arrival, Joined, Reply
from fedshelf.core.state import ServerState
from fedshelf.simulate.simulated_wire import Wire
from fedshelf.simulate.virtual import Durations

NOTHING_CAN_ARRIVE = (
    "the run waits for more clients than can take part: all simulated ones have answered. Those that were refused are "
    "named above; else there are fewer stores than --min-clients"
)


class Backend(Protocol):
    """Plays clients, in this process or in others."""

    def submit(self, name: str, message: ServerMessage) -> None:
        """Take work on; may start it."""

    def next(self) -> tuple[str, ClientMessage] | None:
        """The next finished answer; None if there is no work."""


class LocalTransport:
    """`Transport` to simulated clients whose answers come as they are computed, and its `VirtualClock`: for rounds that
    wait for all answers. The time is that of the latest of them. (Where order matters: `ordered.VirtualTimeTransport`.)

    The names of clients are their addresses.

    Args:
        backend: plays the clients.
        joins: of all clients.
        durations: how long they take, in virtual seconds.
    """

    def __init__(self, backend: Backend, joins: Iterable[Join], durations: Durations) -> None:
        self._backend = backend
        self._joins = deque(joins)
        self._durations = durations
        self._tasks: dict[str, tuple[TaskKey | None, float]] = {}  # at work: which task, and when it is over
        self._num_train: dict[str, int] = {}
        self._wire = Wire()
        self._now = 0.0

    def send(self, address: str, message: ServerMessage) -> int:
        message, num_bytes = self._wire.down(address, message)
        seconds = self._durations.seconds(address, message, self._num_train.get(address, 0))
        self._tasks[address] = task_key(message), self._now + seconds
        self._backend.submit(address, message)
        return num_bytes

    def receive(self, timeout: float) -> Arrival | None:
        """See `Transport`.

        Raises:
            RunError: nothing can arrive any more: to wait for it would be for ever.
        """
        if self._joins:
            join = self._joins.popleft()
            return Joined(address=join.client, join=join)
        finished = self._backend.next()
        if finished is None:
            raise RunError(NOTHING_CAN_ARRIVE)
        name, message = finished
        key, due = self._tasks.pop(name)
        self._now = max(self._now, due)
        if isinstance(message, Ready):
            self._num_train[name] = message.num_train
        return Reply(address=name, message=message, num_bytes=self._wire.up(message), task=key)

    def refuse(self, address: str, reason: str) -> None:
        """The round knows; a simulated client needs no telling."""

    def close(self, reason: str) -> None:
        """Nobody is waiting: simulated clients live in this process or end with it."""

    def now(self) -> float:
        return self._now

    def due(self, client: str) -> float | None:
        task = self._tasks.get(client)
        return None if task is None else task[1]

    def is_settled(self) -> bool:
        """Whatever is computed comes at its own time."""
        return not self._joins and not self._tasks

    def resume(self, state: ServerState) -> None:
        self._now = state.virtual_seconds

    def snapshot(self, state: ServerState) -> ServerState:
        """Rounds wait for all answers: nobody is at work between them."""
        return replace(state, virtual_seconds=self._now, in_flight=())


class InProcess:
    """A backend that computes each answer when it is asked for."""

    def __init__(self, run: "RunMessage") -> None:
        self._play = run
        self._queue: deque[tuple[str, ServerMessage]] = deque()

    def submit(self, name: str, message: ServerMessage) -> None:
        self._queue.append((name, message))

    def next(self) -> tuple[str, ClientMessage] | None:
        if not self._queue:
            return None
        name, message = self._queue.popleft()
        return name, self._play(name, message)


class RunMessage(Protocol):
    """Answers a message as the client of that name would; a client's failure is an answer, too."""

    def __call__(self, name: str, message: ServerMessage) -> ClientMessage: ...
