"""A client that fails again and again is excluded with its reason, and the others carry on; waiting says what for."""

from typing import Any

import pytest

from fedshelf.core.errors import RunError
from fedshelf.core.events import ClientExcluded, ClientStatus, RoundVoid, RunStatus, Waiting
from fedshelf.core.messages import Broadcast, Failure, Purpose, ServerMessage
from fedshelf.core.ports import Left
from tests.fakes import Answer
from tests.worlds import World

FIVE = ("a", "b", "c", "d", "e")


def failing(*, will_repeat: bool, reason: str = "no disk") -> Any:
    def tamper(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(message, Broadcast) and message.purpose is Purpose.TRAIN:
            return Failure(key=message.key, reason=reason, will_repeat=will_repeat)
        return honest

    return tamper


def statuses(world: World, name: str) -> list[ClientStatus]:
    return [member.status for record in world.finished for member in record.clients if member.client == name]


def test_a_failure_that_will_repeat_excludes_its_client_at_once_and_the_run_goes_on() -> None:
    world = World(names=FIVE, num_rounds=3, rounds={"quorum": None}, tampers={"c": failing(will_repeat=True)})
    assert world.run() is RunStatus.FINISHED
    assert statuses(world, "c") == [ClientStatus.FAILED]
    (excluded,) = world.sink.of(ClientExcluded)
    assert (excluded.client, excluded.reason) == ("c", "no disk")
    assert "no disk" in world.transport.refused["line-to-c"]
    assert [len(record.clients) for record in world.finished] == [5, 4, 4]


@pytest.mark.parametrize(("quorum", "times"), [(None, 1), (1, 0)])
def test_a_run_that_the_default_quorum_lets_shrink_to_one_store_says_so_once(
    quorum: int | None, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    fails = failing(will_repeat=True)
    world = World(names=("a", "b"), num_rounds=4, rounds={"quorum": quorum}, tampers={"b": fails})
    assert world.run() is RunStatus.FINISHED
    said = [line for line in caplog.messages if "rounds now count one store only, 'a', which alone is live" in line]
    assert len(said) == times


def test_a_run_that_was_meant_for_one_store_says_nothing_of_it(caplog: pytest.LogCaptureFixture) -> None:
    world = World(names=("a",), num_rounds=2, rounds={"quorum": None}, plan={"start_clients": 1})
    assert world.run() is RunStatus.FINISHED
    assert not caplog.messages


def test_failures_that_may_pass_exclude_after_three_in_a_row() -> None:
    world = World(names=FIVE, num_rounds=5, rounds={"quorum": None}, tampers={"c": failing(will_repeat=False)})
    assert world.run() is RunStatus.FINISHED
    assert statuses(world, "c") == [ClientStatus.FAILED] * 3
    assert [event.reason for event in world.sink.of(ClientExcluded)] == ["no disk (3 times in a row)"]


def test_a_counted_upload_forgives_what_was_before() -> None:
    fail, calls = failing(will_repeat=False), []

    def often(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(message, Broadcast) and message.purpose is Purpose.TRAIN:
            calls.append(message.key.round)
            return honest if message.key.round % 3 == 0 else fail(message, honest)
        return honest

    world = World(names=FIVE, num_rounds=9, rounds={"quorum": None}, tampers={"c": often})
    assert world.run() is RunStatus.FINISHED
    assert len(calls) == 9
    assert not world.sink.of(ClientExcluded)


def test_a_run_whose_clients_are_all_excluded_fails_with_their_reasons() -> None:
    world = World(names=("a", "b"), tampers=dict.fromkeys("ab", failing(will_repeat=True, reason="one photo only")))
    with pytest.raises(RunError, match=r"no client is left.*a: one photo only; b: one photo only"):
        world.run()
    assert len(world.sink.of(RoundVoid)) == 1, "it is not tried ten times"


def test_a_lost_client_stalls_no_run_whose_quorum_is_met() -> None:
    """The minimum of clients gates the start alone."""
    world = World(names=FIVE, num_rounds=4, rounds={"quorum": None, "timeout": 50.0})
    emit = world.sink.emit

    def lose(event: Any) -> None:
        emit(event)
        if getattr(event, "round", 0) == 1 and type(event).__name__ == "RoundFinished":
            for name in ("a", "b"):
                world.transport.arrive(Left(address=f"line-to-{name}"))

    world.sink.emit = lose  # type: ignore[method-assign]
    assert world.run() is RunStatus.FINISHED
    assert [len(record.clients) for record in world.finished][-1] == 3


def test_a_wait_says_what_for_who_is_there_and_who_is_missing_at_growing_intervals() -> None:
    world = World(names=("a", "b", "c"), num_rounds=1)
    late = world.peer("c")
    for name in ("a", "b"):
        world.transport.connect(world.peer(name))
    world.transport.connect(late, delay=95.0)
    assert world.server().run() is RunStatus.FINISHED
    notices = [event for event in world.sink.of(Waiting) if event.what == "3 clients to start"]
    assert [event.live for event in notices] == [("a", "b")] * 3
    assert [round(event.seconds) for event in notices] == [10, 30, 70], "after 10 s, then 20 s, then 40 s more"


def test_a_wait_for_answers_names_the_clients_that_owe_them() -> None:
    world = World(names=("a", "b", "c"), num_rounds=1, delays={"c": 45.0}, rounds={"timeout": 100.0, "quorum": None})
    assert world.run() is RunStatus.FINISHED
    notices = [event for event in world.sink.of(Waiting) if event.what.startswith("answers")]
    assert notices
    assert all(event.missing == ("c",) for event in notices)
