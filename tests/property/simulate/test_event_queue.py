"""Virtual time against an oracle that looks through a plain list for what comes next."""

from dataclasses import dataclass, field

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedshelf.core.messages import Broadcast, Purpose, TaskKey
from fedshelf.simulate.event_queue import EventKind, EventQueue, SimulatedEvent

CLIENTS = "abc"


@dataclass(frozen=True)
class Order:
    """Something to ask for, once `after` things have happened."""

    client: str
    trains: bool
    seconds: float
    missing: float | None
    after: int


def due(queue: EventQueue, client: str) -> float | None:
    """When `client` will have done all that it was given; None if it has nothing to do."""
    tasks = queue._queues.get(client)
    return tasks[-1].due if tasks else None


def messages(number: int, order: Order) -> Broadcast:
    """No two tasks have one key."""
    key = TaskKey(run_id="r", round=number, attempt=0)
    purpose = Purpose.TRAIN if order.trains else Purpose.EVALUATE
    return Broadcast(key=key, purpose=purpose, vectors={"params": torch.zeros(1)}, client_lr=0.1)


@dataclass
class Entry:
    number: int
    order: Order
    due: float
    state: str = "at work or waiting"


@dataclass
class Oracle:
    """A list of all that is to be done; what comes next is the least of it."""

    now: float = 0.0
    entries: list[Entry] = field(default_factory=list)

    def of(self, client: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.order.client == client]

    def is_away(self, client: str) -> bool:
        return any(entry.state == "away" for entry in self.of(client))

    def push(self, number: int, order: Order) -> None:
        own = self.of(order.client)
        if order.trains and len(own) > 1 and own[-1].order.trains:
            self.entries.remove(own.pop())
        begins = own[-1].due if own else self.now
        self.entries.append(Entry(number, order, begins + order.seconds))

    def next(self) -> tuple[float, str, int] | None:
        """When, what, to which task."""
        firsts = [own[0] for client in CLIENTS if (own := self.of(client))]
        if not firsts:
            return None
        entry = min(firsts, key=self._sort_key)
        self.now, _, number = self._sort_key(entry)
        order = entry.order
        if entry.state == "away":
            self.entries.remove(entry)
            return self.now, "joined", number
        if order.missing is not None:
            entry.state = "away"
            for other in self.of(order.client)[1:]:
                self.entries.remove(other)
            return self.now, "left", number
        self.entries.remove(entry)
        return self.now, "answered", number

    def _sort_key(self, entry: Entry) -> tuple[float, bool, int]:
        order = entry.order
        if entry.state == "away":
            return entry.due, False, entry.number
        if order.missing is not None:
            return entry.due - order.missing * order.seconds, False, entry.number
        return entry.due, order.trains, entry.number


def orders() -> st.SearchStrategy[list[Order]]:
    seconds = st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0])  # ties are common
    training = st.builds(
        Order, client=st.sampled_from(CLIENTS), trains=st.just(True), seconds=seconds,
        missing=st.one_of(st.none(), st.none(), st.sampled_from([0.25, 0.5, 1.0])), after=st.integers(0, 8),
    )  # fmt: skip
    evaluation = st.builds(
        Order, client=st.sampled_from(CLIENTS), trains=st.just(False), seconds=st.just(0.0), missing=st.none(),
        after=st.integers(0, 8),
    )  # fmt: skip
    return st.lists(st.one_of(training, training, evaluation), min_size=1, max_size=12)


def push(queue: EventQueue, number: int, order: Order) -> None:
    queue.push(order.client, messages(number, order), seconds=order.seconds, missing=order.missing)


def told(queue: EventQueue, event: SimulatedEvent) -> tuple[float, str, int]:
    assert event.task.key is not None
    return queue.now, event.what.value, event.task.key.round


def next_of(queue: EventQueue) -> tuple[float, str, int] | None:
    if queue.is_empty():
        return None
    event = queue.advance(1000.0)
    assert event is not None
    return told(queue, event)


@given(asked=orders())
def test_what_happens_and_when_is_what_a_plain_list_says(asked: list[Order]) -> None:
    queue, oracle = EventQueue(), Oracle()
    waiting = list(enumerate(sorted(asked, key=lambda order: order.after), start=1))
    for happened in range(100):
        while waiting and (waiting[0][1].after <= happened or queue.is_empty()):
            number, order = waiting.pop(0)
            assert queue.is_away(order.client) == oracle.is_away(order.client)
            if not oracle.is_away(order.client):
                push(queue, number, order)
                oracle.push(number, order)
        found = next_of(queue)
        assert found == oracle.next()
        if found is None and not waiting:
            return
    raise AssertionError("it does not end")


@given(asked=orders(), at=st.integers(0, 12), again=st.booleans())
def test_an_agenda_that_is_gone_on_with_comes_to_what_it_would_have_come_to(
    asked: list[Order], at: int, again: bool
) -> None:
    """Whether the tasks that were out are given again (asynchronous rounds) or not (synchronous ones)."""
    trainings = [order for order in asked if order.trains]
    queue = EventQueue()
    for number, order in enumerate(trainings, start=1):
        if not queue.is_away(order.client):
            push(queue, number, order)
        if order.after % 2 and not queue.is_empty():
            queue.advance(1000.0)
    for _ in range(at):
        if not queue.is_empty():
            queue.advance(1000.0)
    while (
        not queue.is_settled()
    ):  # who is about to leave at this very moment counts as having left: chance draws no ties
        queue.advance(0.0)
    noted = queue.in_flight()
    resumed = EventQueue()
    resumed.resume(queue.now, noted)
    assert resumed.now == queue.now
    assert resumed.in_flight() == noted
    for client in CLIENTS:
        assert due(resumed, client) == due(queue, client)
    for flight in noted if again else ():
        if not resumed.is_away(flight.client):
            order = trainings[flight.key.round - 1]
            resumed.push(flight.client, messages(flight.key.round, order), seconds=77.0)  # its end is known
    while (expected := next_of(queue)) is not None:
        found = next_of(resumed)
        if not again and expected[1] == "answered":
            expected = (expected[0], "nothing", expected[2])
        assert found == expected
        assert resumed.in_flight() == queue.in_flight()
    assert resumed.is_empty()


@given(asked=orders(), step=st.sampled_from([0.1, 0.3, 1.0]))
def test_time_moved_on_in_small_steps_passes_nothing(asked: list[Order], step: float) -> None:
    queue, oracle = EventQueue(), Oracle()
    for number, order in enumerate(asked, start=1):
        push(queue, number, order)
        oracle.push(number, order)
    while not queue.is_empty():
        before = queue.now
        event = queue.advance(step)
        if event is None:
            assert queue.now == before + step
            continue
        assert before <= queue.now <= before + step
        assert told(queue, event) == oracle.next()
    assert oracle.next() is None


def test_what_is_broken_off_is_not_computed_and_the_rest_is_as_it_begins() -> None:
    queue = EventQueue()
    given = {
        1: Order("a", True, 1.0, None, 0), 2: Order("a", True, 1.0, None, 0), 3: Order("b", True, 3.0, 0.5, 0),
        4: Order("a", False, 0.0, None, 0),
    }  # fmt: skip
    for number, order in given.items():
        push(queue, number, order)
    assert [task.number for task in queue.begun()] == [1]
    begun = []
    while not queue.is_empty():
        event = queue.advance(10.0)
        assert event is not None
        begun.append((event.what, event.task.number, [task.number for task in queue.begun()]))
    assert begun == [
        (EventKind.ANSWERED, 1, [2]), (EventKind.LEFT, 3, []), (EventKind.ANSWERED, 2, [4]),
        (EventKind.ANSWERED, 4, []), (EventKind.JOINED, 3, []),
    ]  # fmt: skip
