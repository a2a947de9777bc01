"""Arrivals in the order of virtual time, whoever is computed first."""

import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from fedshelf.core.errors import RunError
from fedshelf.core.messages import (
    PROTOCOL_VERSION,
    Broadcast,
    ClientMessage,
    Evaluation,
    Join,
    Purpose,
    Ready,
    ServerMessage,
    Setup,
    TaskKey,
    Upload,
)
from fedshelf.core.ports import Arrival, Joined, Left, Reply
from fedshelf.core.rng import Rng
from fedshelf.core.state import InFlight, ModelState, ServerState
from fedshelf.simulate.virtual import Dropout, Durations
from fedshelf.simulate.virtual_time_transport import VirtualTimeTransport

SETUP = Setup(run_id="r", config="", catalogue="", layout_digest="")
PHOTOS = {"a": 100, "b": 100, "c": 100}
DURATIONS = Durations(slowdowns={"a": 1.0, "b": 1.0, "c": 5.0}, local_epochs=1, batch_size=10)
ALWAYS = Dropout(probability=0.999999999, rng=Rng(0))


class Whenever:
    """A backend that computes in an order of its own, but never two tasks of one client at once."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self.waiting: dict[str, ServerMessage] = {}
        self.computed: list[tuple[str, int]] = []

    def submit(self, name: str, message: ServerMessage) -> None:
        assert name not in self.waiting, f"{name} is to do two things at once"
        self.waiting[name] = message

    def next(self) -> tuple[str, ClientMessage] | None:
        if not self.waiting:
            return None
        name = self._random.choice(sorted(self.waiting))
        message = self.waiting.pop(name)
        if isinstance(message, Setup):
            return name, Ready(
                run_id="r", layout_digest="", catalogue_digest="", config_digest="", num_train=PHOTOS[name],
                num_validation=0, num_left_out=0,
            )  # fmt: skip
        assert isinstance(message, Broadcast)
        self.computed.append((name, message.key.round))
        if message.purpose is Purpose.EVALUATE:
            return name, Evaluation(key=message.key, num_examples=1, num_correct=1, loss_sum=0.0)
        return name, Upload(
            key=message.key, vectors={"delta": torch.zeros(2)}, num_examples=1, num_steps=1, train_loss=0.0, seconds=0.0
        )  # fmt: skip


def due(transport: VirtualTimeTransport, client: str) -> float | None:
    """When `client` will have done all that it was given; None if it has nothing to do."""
    queue = transport._events._queues.get(client)
    return queue[-1].due if queue else None


def transport_of(
    backend: Whenever, *, dropout: Dropout | None = None, state: ServerState | None = None, together: bool = False
) -> VirtualTimeTransport:  # fmt: skip
    """With everybody set up who is there."""
    joins = [
        Join(protocol=PROTOCOL_VERSION, version="", client=name, identity=name, classes=()) for name in sorted(PHOTOS)
    ]
    transport = VirtualTimeTransport(backend, joins, DURATIONS, dropout or Dropout(), together=together)
    if state is not None:
        transport.resume(state)
    while not transport.is_settled():
        match transport.receive(0.0):
            case Joined(address=address):
                transport.send(address, SETUP)
            case Reply(message=Ready()):
                pass
            case other:
                raise AssertionError(other)
    return transport


def task(number: int, purpose: Purpose = Purpose.TRAIN, **values: object) -> Broadcast:
    key = TaskKey(run_id="r", round=number, attempt=0)
    message = Broadcast(key=key, purpose=purpose, vectors={"params": torch.zeros(2)}, client_lr=0.1)
    return replace(message, **values)  # type: ignore[arg-type]


def name_of(arrival: Arrival | None) -> str | None:
    return None if arrival is None else arrival.address


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_answers_come_in_the_order_of_virtual_time_whoever_is_computed_first(seed: int, together: bool) -> None:
    transport = transport_of(Whenever(seed), together=together)
    transport.send("c", task(1))
    transport.send("b", task(1))
    transport.send("a", task(1, num_steps=15))
    seen = []
    for _ in range(3):
        arrival = transport.receive(10.0)
        assert isinstance(arrival, Reply)
        seen.append((arrival.address, transport.now()))
        if arrival.address == "b":
            transport.send("a", task(2, Purpose.EVALUATE))  # behind the training that it is at
    assert seen == [("b", 1.0), ("a", 1.5), ("a", 1.5)]
    assert isinstance(arrival, Reply)
    assert isinstance(arrival.message, Evaluation)
    assert (name_of(transport.receive(10.0)), transport.now()) == ("c", 5.0)
    with pytest.raises(RunError, match="waits for more clients than can take part"):
        transport.receive(1.0)


def test_evaluations_come_before_uploads_of_the_same_moment() -> None:
    transport = transport_of(Whenever())
    transport.send("a", task(1))
    transport.send("b", task(1))
    assert name_of(transport.receive(1.0)) == "a"
    transport.send("a", task(1, Purpose.EVALUATE))
    arrivals = [transport.receive(1.0), transport.receive(1.0)]
    assert [name_of(arrival) for arrival in arrivals] == ["a", "b"]
    assert transport.now() == 1.0


def test_waiting_moves_the_clock_by_the_timeout_and_never_past_what_is_due() -> None:
    transport = transport_of(Whenever())
    transport.send("a", task(1))
    assert (transport.receive(0.75), transport.now()) == (None, 0.75)
    assert name_of(transport.receive(0.25)) == "a"
    assert transport.now() == 1.0
    transport.send("b", task(1))
    assert name_of(transport.receive(1e9)) == "b"
    assert transport.now() == 2.0


def test_photos_are_what_takes_time() -> None:
    found = {
        (epochs, steps): Durations(slowdowns={"a": 2.0}, local_epochs=epochs, batch_size=40).seconds(
            "a", task(1, num_steps=steps), 100
        )
        for epochs in (1, 3)
        for steps in (None, 1, 3, 4, 0)
    }
    assert found == {  # 100 photos are batches of 40, 40 and 20
        (1, None): 2.0, (1, 1): 0.8, (1, 3): 2.0, (1, 4): 2.8, (1, 0): 0.0,
        (3, None): 6.0, (3, 1): 0.8, (3, 3): 2.0, (3, 4): 2.8, (3, 0): 0.0,
    }  # fmt: skip
    assert Durations(local_epochs=2).seconds("unnamed", task(1), 100) == 2.0
    assert DURATIONS.seconds("c", task(1, Purpose.EVALUATE), 100) == 0.0
    assert DURATIONS.seconds("c", task(1, Purpose.COMPARE), 100) == 0.0
    assert DURATIONS.seconds("c", SETUP, 100) == 0.0


def test_of_tasks_that_a_client_has_not_begun_only_the_newest_is_done() -> None:
    """And answers of closed work do not pile up: there is one of each client at most."""
    backend = Whenever()
    transport = transport_of(backend)
    for number in range(1, 6):
        transport.send("c", task(number))
    done = []
    while due(transport, "c") is not None:
        arrival = transport.receive(1.0)
        if isinstance(arrival, Reply):
            done.append((arrival.task, transport.now()))
    assert [(key.round, now) for key, now in done if key is not None] == [(1, 5.0), (5, 10.0)]
    assert backend.computed == [("c", 1), ("c", 5)]


def test_who_drops_out_is_away_until_the_task_would_have_been_over_and_nobody_computes_it() -> None:
    backend = Whenever()
    transport = transport_of(backend, dropout=ALWAYS)
    transport.send("c", task(1))
    assert due(transport, "c") == 5.0
    left = transport.receive(10.0)
    assert left == Left(address="c")
    assert 0.0 <= transport.now() < 5.0
    assert transport.send("c", task(2)) == 0
    joined = transport.receive(10.0)
    assert isinstance(joined, Joined)
    assert (joined.address, joined.join.client, transport.now()) == ("c", "c", 5.0)
    assert backend.computed == []
    with pytest.raises(RunError):
        transport.receive(1.0)


def test_dropout_is_drawn_for_each_task_client_and_repetition() -> None:
    half = Dropout(probability=0.5, rng=Rng(3))
    keys = [TaskKey(run_id="r", round=number, attempt=attempt) for number in range(1, 60) for attempt in (0, 1)]
    draws = {(name, key, again): half.missing(name, key, again) for name in "ab" for key in keys for again in (0, 1)}
    assert draws == {(name, key, again): half.missing(name, key, again) for name, key, again in draws}
    dropped = [missing for missing in draws.values() if missing is not None]
    assert 0.4 < len(dropped) / len(draws) < 0.6
    assert len(set(dropped)) == len(dropped), "two tasks share a draw"
    assert all(0 < missing <= 1 for missing in dropped)
    assert 0.4 < sum(dropped) / len(dropped) < 0.6, "the moment is not uniform over the task"
    assert all(Dropout(probability=0.0).missing("a", key) is None for key in keys)


def test_a_task_that_is_given_again_draws_anew() -> None:
    """Else a client that dropped out of a task would do so for ever."""
    once = Dropout(probability=0.5)
    keys = [TaskKey(run_id="r", round=number, attempt=0) for number in range(1, 100)]
    key = next(key for key in keys if once.missing("a", key) is not None and once.missing("a", key, 1) is None)
    transport = transport_of(Whenever(), dropout=once)
    transport.send("a", task(key.round))
    assert isinstance(transport.receive(5.0), Left)
    assert isinstance(transport.receive(5.0), Joined)
    transport.send("a", task(key.round))
    assert isinstance(transport.receive(5.0), Reply)
    assert transport.now() == 2.0


def state_of(transport: VirtualTimeTransport) -> ServerState:
    return transport.snapshot(ServerState(round=3, model=ModelState(params=torch.zeros(2))))


@pytest.mark.parametrize("again", [True, False])
def test_a_resumed_transport_knows_when_everybody_is_done(again: bool) -> None:
    first = transport_of(Whenever())
    first.send("a", task(1))
    first.send("c", task(1))
    assert name_of(first.receive(10.0)) == "a"
    first.send("c", task(2))
    noted = state_of(first)
    assert noted.virtual_seconds == 1.0
    at_work = [(flight.client, flight.key.round, flight.due) for flight in noted.in_flight]
    assert at_work == [("c", 1, 5.0), ("c", 2, 10.0)]

    resumed = transport_of(Whenever(), state=noted)
    assert (resumed.now(), due(resumed, "a"), due(resumed, "c")) == (1.0, None, 10.0)
    if again:
        resumed.send("c", task(1))
        assert due(resumed, "c") == 10.0
        arrival = resumed.receive(10.0)
        assert isinstance(arrival, Reply)
        assert (arrival.task, resumed.now()) == (task(1).key, 5.0)
        resumed.send("c", task(2))
        assert due(resumed, "c") == 10.0
    else:
        resumed.send("c", task(3))  # takes the place of 2, and begins when 1 is over, which nobody hears of
        assert (resumed.receive(10.0), resumed.now()) == (None, 5.0)
    assert isinstance(resumed.receive(10.0), Reply)
    assert resumed.now() == 10.0


def test_who_is_away_when_a_run_is_resumed_comes_back_when_it_would_have() -> None:
    first = transport_of(Whenever(), dropout=ALWAYS)
    first.send("c", task(1))
    before = state_of(first)
    assert isinstance(first.receive(10.0), Left)
    left, noted = first.now(), state_of(first)
    assert [flight.leaves for flight in before.in_flight] == [left]

    resumed = transport_of(Whenever(), state=noted)
    assert resumed.send("c", task(2)) == 0
    arrival = resumed.receive(10.0)
    assert (isinstance(arrival, Joined), name_of(arrival), resumed.now()) == (True, "c", 5.0)

    resumed = transport_of(Whenever(), state=before)
    assert resumed.receive(10.0) == Left(address="c")
    assert resumed.now() == left
    assert isinstance(resumed.receive(10.0), Joined)
    assert resumed.now() == 5.0


def test_a_setup_is_answered_at_once_by_who_is_at_work_elsewhere_in_time() -> None:
    """A resumed run sets everybody up, and takes no virtual time for it."""
    flights = (InFlight(client="a", key=TaskKey(run_id="r", round=1, attempt=0), due=9.0),)
    state = ServerState(round=1, model=ModelState(params=torch.zeros(2)), virtual_seconds=4.0, in_flight=flights)
    assert transport_of(Whenever(), state=state).now() == 4.0


class InBatches:
    """A backend that computes all that it was given at once, and tells of each batch."""

    def __init__(self) -> None:
        self._one_by_one = Whenever()
        self._answers: list[tuple[str, ClientMessage]] = []
        self.batches: list[list[str]] = []

    def submit(self, name: str, message: ServerMessage) -> None:
        self._one_by_one.submit(name, message)

    def next(self) -> tuple[str, ClientMessage] | None:
        if self._one_by_one.waiting:
            self.batches.append(sorted(self._one_by_one.waiting))
        while (answer := self._one_by_one.next()) is not None:
            self._answers.append(answer)
        return self._answers.pop() if self._answers else None


def test_who_is_computed_together_is_who_has_begun_when_an_answer_is_missing() -> None:
    backend = InBatches()
    joins: Mapping[str, Join] = {
        name: Join(protocol=PROTOCOL_VERSION, version="", client=name, identity=name, classes=()) for name in PHOTOS
    }
    transport = VirtualTimeTransport(backend, joins.values(), DURATIONS, Dropout(), together=True)
    for _ in PHOTOS:
        arrival = transport.receive(0.0)
        assert arrival is not None
        transport.send(arrival.address, SETUP)
    for _ in PHOTOS:
        transport.receive(0.0)
    for name in PHOTOS:
        transport.send(name, task(1))
    for _ in range(6):  # a and b are asked again each time that they answer, as in asynchronous rounds
        arrival = transport.receive(10.0)
        assert isinstance(arrival, Reply)
        assert arrival.task is not None
        transport.send(arrival.address, task(arrival.task.round + 1))
    assert backend.batches == [["a", "b", "c"], ["a", "b", "c"], ["a", "b"], ["a", "b"]]
