"""What simulated clients are at, and what comes of it when: virtual time, moved on from one happening to the next.

A client does one thing after the other. What it is given while it is at work begins when that is over; of trainings
that have not begun only the newest stays (a deployed client, too, can fetch no other model than the newest). What
happens at the same moment comes in this order: joining, leaving and answers that take no time, then uploads; among
them, as they were asked for. So the course of a run depends on nothing but durations, whoever computes and how fast.
"""

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from fedshelf.core.messages import Broadcast, Purpose, ServerMessage, Setup, TaskKey, task_key
from fedshelf.core.state import InFlight


class EventKind(Enum):
    """What happens to a task: its answer comes, its client leaves in the middle or is back; NOTHING where the answer
    was for a server that has been started again since."""

    ANSWERED = "answered"
    LEFT = "left"
    JOINED = "joined"
    NOTHING = "nothing"


@dataclass(kw_only=True, slots=True, eq=False)
class SimulatedTask:
    """Something that a client was given to do.

    `due` is when it is over, `leaves` when the client breaks off before that (it is back when the task would have been
    over), in virtual seconds. `message` is there until somebody computes the answer.
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
    """What has come of a task at the present moment; where its client has left, that is before the task's `due`."""

    what: EventKind
    task: SimulatedTask


class EventQueue:
    """All clients' tasks, and the time."""

    def __init__(self) -> None:
        self._now = 0.0
        self._count = 0
        self._queues: dict[str, deque[SimulatedTask]] = {}  # the first task of each is at work
        self._away: set[str] = set()
        self._coming: list[tuple[float, bool, int, SimulatedTask]] = []  # one entry for each queue, and for each setup
        self._begun: list[SimulatedTask] = []

    @property
    def now(self) -> float:
        """Virtual seconds."""
        return self._now

    def is_empty(self) -> bool:
        """Whether nothing will ever happen of what is known now."""
        return not self._coming

    def is_settled(self) -> bool:
        """Whether nothing but uploads may still come at this very moment."""
        return not self._coming or self._coming[0][:2] > (self._now, False)

    def is_away(self, client: str) -> bool:
        return client in self._away

    def push(self, client: str, message: ServerMessage, *, seconds: float, missing: float | None = None) -> None:
        """Let `client` do what `message` asks.

        Args:
            client: who is not away.
            message: a setup is answered at once, whatever else the client is at.
            seconds: how long it takes.
            missing: the part of the task, above 0 and at most 1, that is still to be done when the client breaks off;
                None if it does not.
        """
        key, trains = task_key(message), isinstance(message, Broadcast) and message.purpose is Purpose.TRAIN
        queue = self._queues.setdefault(client, deque())
        for task in queue:
            if task.restored and trains and task.key == key:  # it goes on with what it was at
                task.message, task.restored = message, False
                if task is queue[0]:
                    self._compute(task)
                return
        if trains and len(queue) > 1 and queue[-1].trains:
            queue.pop()
        self._count += 1
        begins = queue[-1].due if queue and not isinstance(message, Setup) else self._now
        due = max(begins, self._now) + seconds
        leaves = None if missing is None else due - missing * seconds  # counted from the end, which is what is saved
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
        """Tasks that have begun since the last call, and whose answers somebody has to compute."""
        begun, self._begun = self._begun, []
        return begun

    def advance(self, seconds: float) -> SimulatedEvent | None:
        """Move the time on to what happens next, but by at most `seconds`: then there is none."""
        end = self._now + seconds
        if not self._coming or self._coming[0][0] > end:
            self._now = end
            return None
        at, _, _, task = heapq.heappop(self._coming)
        self._now = max(self._now, at)
        queue = self._queues.get(task.client, deque())
        at_work = bool(queue) and task is queue[0]  # else it is a setup
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
        """The trainings that are not over, in the order in which they were asked for."""
        tasks = sorted((task for queue in self._queues.values() for task in queue), key=lambda task: task.number)
        return tuple(
            InFlight(client=task.client, key=task.key, due=task.due, leaves=task.leaves)
            for task in tasks
            if task.trains and task.key is not None
        )

    def resume(self, now: float, in_flight: Iterable[InFlight]) -> None:
        """Set the time, and let clients be at what they were at; nobody computes that unless it is given again."""
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
        """Have the answer computed, unless there will be none."""
        if task.leaves is not None:
            task.message = None
        elif task.message is not None:
            self._begun.append(task)

    def _leave(self, task: SimulatedTask) -> None:
        """What else the client was given is lost, too."""
        self._away.add(task.client)
        self._queues[task.client] = deque([task])
        heapq.heappush(self._coming, (task.due, False, task.number, task))
