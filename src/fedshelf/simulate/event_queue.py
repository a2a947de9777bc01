"""Discrete-event simulation of clients in virtual time.

A client does one task after the other. A task sent to a busy client starts when the current one ends. Of the trainings
that have not started, only the newest is kept, because a deployed client can also fetch only the newest model.

Simultaneous events are ordered: first joins, departures and answers that take no time, then uploads; ties are broken by
the order of dispatch. A run therefore depends only on durations, not on which process computes an answer or how fast.
"""

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from fedshelf.core.messages import Broadcast, Purpose, ServerMessage, Setup, TaskKey, task_key
from fedshelf.core.state import InFlight


class EventKind(Enum):
    """What happens to a task.

    `NOTHING` means that the answer was for a server that has been restarted since.
    """

    ANSWERED = "answered"
    LEFT = "left"
    JOINED = "joined"
    NOTHING = "nothing"


@dataclass(kw_only=True, slots=True, eq=False)
class SimulatedTask:
    """A task dispatched to a client.

    Attributes:
        client: the client's name.
        number: order of dispatch.
        key: identifies the round's task, if it is one.
        trains: whether the client trains.
        due: virtual seconds at which the task ends.
        leaves: virtual seconds at which the client drops out, before `due`; it returns at `due`.
        message: the server's message, until its answer is computed.
        restored: whether the task comes from a checkpoint.
    """

    client: str
    number: int
    key: TaskKey | None
    trains: bool
    due: float
    leaves: float | None = None
    message: ServerMessage | None = None
    restored: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedEvent:
    """An event at the current virtual time. A client that leaves does so before the task's `due`.

    Attributes:
        what: the kind of event.
        task: the task it concerns.
    """

    what: EventKind
    task: SimulatedTask


class EventQueue:
    """All clients' tasks, and the virtual clock."""

    def __init__(self) -> None:
        self._now = 0.0
        self._count = 0
        self._queues: dict[str, deque[SimulatedTask]] = {}  # the first task of each is in progress
        self._away: set[str] = set()
        self._coming: list[tuple[float, bool, int, SimulatedTask]] = []  # one entry per queue, and one per setup
        self._begun: list[SimulatedTask] = []

    @property
    def now(self) -> float:
        """Current virtual time in seconds."""
        return self._now

    def is_empty(self) -> bool:
        """Whether no event is pending."""
        return not self._coming

    def is_settled(self) -> bool:
        """Whether only uploads can still occur at the current time."""
        return not self._coming or self._coming[0][:2] > (self._now, False)

    def is_away(self, client: str) -> bool:
        """Whether the client has dropped out."""
        return client in self._away

    def push(self, client: str, message: ServerMessage, *, seconds: float, missing: float | None = None) -> None:
        """Dispatch a message to a client.

        Args:
            client: a client that is not away.
            message: the message; a setup is answered at once, even by a busy client.
            seconds: the task's duration in virtual seconds.
            missing: the fraction of the task, in (0, 1], that is left when the client drops out; None if it does not.
        """
        key, trains = task_key(message), isinstance(message, Broadcast) and message.purpose is Purpose.TRAIN
        queue = self._queues.setdefault(client, deque())
        for task in queue:
            if task.restored and trains and task.key == key:  # resumes its restored task
                task.message, task.restored = message, False
                if task is queue[0]:
                    self._compute(task)
                return
        if trains and len(queue) > 1 and queue[-1].trains:
            queue.pop()
        self._count += 1
        begins = queue[-1].due if queue and not isinstance(message, Setup) else self._now
        due = max(begins, self._now) + seconds
        leaves = None if missing is None else due - missing * seconds  # relative to the end, which is saved
        task = SimulatedTask(
            client=client, number=self._count, key=key, trains=trains, due=due, leaves=leaves, message=message
        )  # fmt: skip
        if isinstance(message, Setup):
            self._begin(task)
            return
        queue.append(task)
        if task is queue[0]:
            self._begin(task)

    def begun(self) -> list[SimulatedTask]:
        """Return the tasks that have started since the last call and whose answers must be computed."""
        begun, self._begun = self._begun, []
        return begun

    def advance(self, seconds: float) -> SimulatedEvent | None:
        """Advance the clock to the next event.

        Args:
            seconds: maximum virtual seconds to advance.

        Returns:
            The event, or None if none occurs within `seconds`.
        """
        end = self._now + seconds
        if not self._coming or self._coming[0][0] > end:
            self._now = end
            return None
        at, _, _, task = heapq.heappop(self._coming)
        self._now = max(self._now, at)
        queue = self._queues.get(task.client, deque())
        at_work = bool(queue) and task is queue[0]  # otherwise it is a setup
        if task.client in self._away:
            if not at_work:
                return SimulatedEvent(what=EventKind.NOTHING, task=task)
            self._away.remove(task.client)
            del self._queues[task.client]
            return SimulatedEvent(what=EventKind.JOINED, task=task)
        if task.leaves is not None:
            self._leave(task)
            return SimulatedEvent(what=EventKind.LEFT, task=task)
        if at_work:
            queue.popleft()
            if queue:
                self._begin(queue[0])
        return SimulatedEvent(what=EventKind.NOTHING if task.restored else EventKind.ANSWERED, task=task)

    def in_flight(self) -> tuple[InFlight, ...]:
        """Return the unfinished trainings in the order of dispatch."""
        tasks = sorted((task for queue in self._queues.values() for task in queue), key=lambda task: task.number)
        return tuple(
            InFlight(client=task.client, key=task.key, due=task.due, leaves=task.leaves)
            for task in tasks
            if task.trains and task.key is not None
        )

    def resume(self, now: float, in_flight: Iterable[InFlight]) -> None:
        """Restore the clock and the tasks in flight; an answer is computed only if its task is sent again."""
        self._now = now
        for flight in in_flight:
            self._count += 1
            task = SimulatedTask(
                client=flight.client, number=self._count, key=flight.key, trains=True,
                due=now if flight.due is None else flight.due, leaves=flight.leaves, restored=True,
            )  # fmt: skip
            queue = self._queues.setdefault(task.client, deque())
            queue.append(task)
            if task is not queue[0]:
                continue
            if task.leaves is not None and task.leaves <= now:
                self._leave(task)
            else:
                self._begin(task)

    def _begin(self, task: SimulatedTask) -> None:
        at = task.due if task.leaves is None else task.leaves
        heapq.heappush(self._coming, (at, task.trains and task.leaves is None, task.number, task))
        self._compute(task)

    def _compute(self, task: SimulatedTask) -> None:
        """Schedule the answer's computation, unless the client drops out."""
        if task.leaves is not None:
            task.message = None
        elif task.message is not None:
            self._begun.append(task)

    def _leave(self, task: SimulatedTask) -> None:
        """Drop all tasks of a client that leaves."""
        self._away.add(task.client)
        self._queues[task.client] = deque([task])
        heapq.heappush(self._coming, (task.due, False, task.number, task))
