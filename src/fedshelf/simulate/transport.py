"""The rounds' transport without a network: messages go to a backend that runs the clients."""

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
    """Runs clients, in this process or in others."""

    def submit(self, name: str, message: ServerMessage) -> None:
        """Accept a message for client `name`; may start computing."""

    def next(self) -> tuple[str, ClientMessage] | None:
        """Return the next client and its answer, or None if there is no work."""


class LocalTransport:
    """`Transport` to simulated clients that delivers answers as they are computed, and its `VirtualClock`.

    For rounds that wait for all answers; the time is that of the latest one. Where order matters, use
    `VirtualTimeTransport`. Clients' names serve as their addresses.

    Args:
        backend: runs the clients.
        joins: the `Join` of each client.
        durations: task durations in virtual seconds.
    """

    def __init__(self, backend: Backend, joins: Iterable[Join], durations: Durations) -> None:
        self._backend = backend
        self._joins = deque(joins)
        self._durations = durations
        self._tasks: dict[str, tuple[TaskKey | None, float]] = {}  # in progress: the task and when it ends
        self._num_train: dict[str, int] = {}
        self._wire = Wire()
        self._now = 0.0

    def send(self, address: str, message: ServerMessage) -> int:
        """See `Transport`."""
        message, num_bytes = self._wire.down(address, message)
        seconds = self._durations.seconds(address, message, self._num_train.get(address, 0))
        self._tasks[address] = task_key(message), self._now + seconds
        self._backend.submit(address, message)
        return num_bytes

    def receive(self, timeout: float) -> Arrival | None:
        """See `Transport`.

        Raises:
            RunError: no answer can arrive any more, so waiting would never end.
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
        """Do nothing: the round records the refusal, and a simulated client does not need it."""

    def close(self, reason: str) -> None:
        """Do nothing: simulated clients end with the simulation."""

    def now(self) -> float:
        """See `VirtualClock`."""
        return self._now

    def due(self, client: str) -> float | None:
        """See `VirtualClock`."""
        task = self._tasks.get(client)
        return None if task is None else task[1]

    def is_settled(self) -> bool:
        """Whether no client has work; each answer has its own time."""
        return not self._joins and not self._tasks

    def resume(self, state: ServerState) -> None:
        """See `VirtualClock`."""
        self._now = state.virtual_seconds

    def snapshot(self, state: ServerState) -> ServerState:
        """See `VirtualClock`; no task is in flight between rounds."""
        return replace(state, virtual_seconds=self._now, in_flight=())


class InProcess:
    """A backend that computes each answer when it is requested.

    Args:
        run: handles a message as a client.
    """

    def __init__(self, run: "RunMessage") -> None:
        self._play = run
        self._queue: deque[tuple[str, ServerMessage]] = deque()

    def submit(self, name: str, message: ServerMessage) -> None:
        """See `Backend`."""
        self._queue.append((name, message))

    def next(self) -> tuple[str, ClientMessage] | None:
        """See `Backend`."""
        if not self._queue:
            return None
        name, message = self._queue.popleft()
        return name, self._play(name, message)


class RunMessage(Protocol):
    """Handles a message as the named client; a failure of the client is an answer, too."""

    def __call__(self, name: str, message: ServerMessage) -> ClientMessage: ...
