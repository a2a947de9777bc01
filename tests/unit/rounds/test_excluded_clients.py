"""A client that fails again and again is excluded with its reason, and the others carry on; waiting says what for."""

from dataclasses import replace
from typing import Any

import pytest

from fedshelf.algorithms.fedavg import FedAvg
from fedshelf.algorithms.fedbuff import FedBuff
from fedshelf.algorithms.ridge import Ridge
from fedshelf.core.errors import RunError
from fedshelf.core.events import (
    ClientExcluded,
    ClientJoined,
    ClientLeft,
    ClientRefused,
    ClientStatus,
    RoundFinished,
    RoundVoid,
    RunStatus,
    Waiting,
)
from fedshelf.core.messages import Broadcast, Evaluation, Failure, Purpose, Ready, ServerMessage, Setup, Upload
from fedshelf.core.ports import Left
from fedshelf.scheduling.early_stopping import EarlyStopping
from tests.fakes import Answer, FakeTransport
from tests.worlds import Tamper, World

FIVE = ("a", "b", "c", "d", "e")


def failing(*, will_repeat: bool, reason: str = "no disk") -> Any:
    def tamper(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(message, Broadcast) and message.purpose is Purpose.TRAIN:
            return Failure(key=message.key, reason=reason, will_repeat=will_repeat)
        return honest

    return tamper


def statuses(world: World, name: str) -> list[ClientStatus]:
    return [member.status for record in world.finished for member in record.clients if member.client == name]


def names_of(record: RoundFinished) -> list[str]:
    return [member.client for member in record.clients]


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


@pytest.mark.parametrize("first", [1, 2])
def test_where_the_sums_of_the_others_stay_in_the_model_one_store_alone_is_no_concern(
    first: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It is one if the other store fails in round 1 already, and nothing of it is there."""
    fails = failing(will_repeat=True)

    def tamper(message: ServerMessage, honest: Answer) -> Answer:
        answer: Answer = fails(message, honest)
        return answer if isinstance(message, Broadcast) and message.key.round >= first else honest

    world = World(names=("a", "b"), num_rounds=3, algorithm=Ridge(), rounds={"quorum": None}, tampers={"b": tamper})
    assert world.run() is RunStatus.FINISHED
    said = [line for line in caplog.messages if "rounds now count one store only, 'a'" in line]
    assert len(said) == (first == 1)


def test_a_run_that_was_meant_for_one_store_says_nothing_of_it(caplog: pytest.LogCaptureFixture) -> None:
    world = World(names=("a",), num_rounds=2, rounds={"quorum": None}, plan={"start_clients": 1})
    assert world.run() is RunStatus.FINISHED
    assert not caplog.messages


def test_failures_that_may_pass_exclude_for_ten_rounds_after_three_in_a_row() -> None:
    world = World(names=FIVE, num_rounds=15, rounds={"quorum": None}, tampers={"c": failing(will_repeat=False)})
    assert world.run() is RunStatus.FINISHED
    assert [record.round for record in world.finished if "c" in names_of(record)] == [1, 2, 3, 14]
    assert [(event.reason, event.last_round) for event in world.sink.of(ClientExcluded)] == [
        ("no disk (3 times in a row)", 13), ("no disk (4 times in a row)", 24),
    ]  # fmt: skip
    assert "line-to-c" not in world.transport.refused, "it stays connected, and need not be started again"


def test_a_client_that_is_started_again_and_again_only_to_fail_is_left_alone_for_ten_rounds() -> None:
    """Each failure will repeat, it says: its exclusion until a restart would otherwise cost the others each round."""
    world = World(names=FIVE, num_rounds=12, rounds={"quorum": None}, tampers={"c": failing(will_repeat=True)})
    emit, lines = world.sink.emit, iter(range(100))

    def restart(event: Any) -> None:
        emit(event)
        if isinstance(event, ClientExcluded):
            world.transport.connect(world.peer("c", address=f"line-{next(lines)}-to-c"))

    world.sink.emit = restart  # type: ignore[method-assign]
    assert world.run() is RunStatus.FINISHED
    assert statuses(world, "c") == [ClientStatus.FAILED] * 3


def test_a_client_that_has_recovered_takes_part_again() -> None:
    fail = failing(will_repeat=False)

    def at_first(message: ServerMessage, honest: Answer) -> Answer:
        return fail(message, honest) if isinstance(message, Broadcast) and message.key.round <= 3 else honest

    world = World(names=FIVE, num_rounds=16, rounds={"quorum": None}, tampers={"c": at_first})
    assert world.run() is RunStatus.FINISHED
    assert statuses(world, "c") == [ClientStatus.FAILED] * 3 + [ClientStatus.COUNTED] * 3
    assert len(world.sink.of(ClientExcluded)) == 1


def test_a_new_connection_does_not_end_an_exclusion() -> None:
    world = World(names=FIVE, num_rounds=8, rounds={"quorum": None}, tampers={"c": failing(will_repeat=False)})
    emit = world.sink.emit

    def reconnect(event: Any) -> None:
        emit(event)
        if isinstance(event, ClientExcluded):
            world.transport.arrive(Left(address="line-to-c"))
            world.transport.connect(world.peer("c", address="another-line-to-c"), delay=0.1)

    world.sink.emit = reconnect  # type: ignore[method-assign]
    assert world.run() is RunStatus.FINISHED
    assert statuses(world, "c") == [ClientStatus.FAILED] * 3


@pytest.mark.parametrize("how", ["fails", "is silent", "answers nonsense"])
def test_a_client_that_trains_but_evaluates_nothing_is_excluded_after_three_rounds(how: str) -> None:
    def tamper(message: ServerMessage, honest: Answer) -> Answer:
        if not isinstance(honest, Evaluation):
            return honest
        failure = Failure(key=honest.key, reason="no memory")
        return {"fails": failure, "is silent": None, "answers nonsense": replace(honest, num_correct=99)}[how]

    world = World(names=FIVE, num_rounds=6, rounds={"quorum": None, "timeout": 1000.0}, tampers={"c": tamper})
    assert world.run() is RunStatus.FINISHED
    assert statuses(world, "c") == [ClientStatus.COUNTED] * 3
    (excluded,) = world.sink.of(ClientExcluded)
    assert "3 times in a row" in excluded.reason
    assert excluded.last_round == 13
    assert world.clock.now() < 250, "a silent one costs a minute a round, not the time limit"


@pytest.mark.parametrize("algorithm", [FedAvg(), FedBuff(server_lr=1.0, buffer_size=2)])
def test_an_exclusion_outlives_the_server(algorithm: Any) -> None:
    world = World(
        names=FIVE, num_rounds=6, algorithm=algorithm, rounds={"quorum": None},
        tampers={"c": failing(will_repeat=False)},
    )  # fmt: skip
    assert world.run() is RunStatus.FINISHED
    (excluded,) = world.sink.of(ClientExcluded)
    last = excluded.last_round or 0
    world.restart()
    assert world.run_connected(num_rounds=last + 2) is RunStatus.FINISHED
    told = world.sink.of(ClientExcluded)[1]
    assert (told.reason, told.last_round) == (excluded.reason, last), "whoever starts the server again is told"
    asked = {m.key.round for m in world.transport.broadcasts("line-to-c")}
    assert not asked & set(range(7, last)), "it is left alone, give or take the version then being made"
    assert max(asked) > last, "and asked again"


def test_a_revoked_client_is_said_to_be_and_counts_for_no_quorum() -> None:
    world = World(names=("a", "b", "c"), num_rounds=4, rounds={"quorum": 3})

    def revoke(message: ServerMessage, honest: Answer) -> Answer:
        if not (isinstance(message, Broadcast) and message.key.round == 2):
            return honest
        world.transport.revoke("c")
        return None

    world.tampers = {"c": revoke}
    assert world.run() is RunStatus.FINISHED
    assert [(event.client, event.reason) for event in world.sink.of(ClientLeft)] == [("c", "store c was revoked")]
    (void,) = world.sink.of(RoundVoid)
    assert [(m.status, m.reason) for m in void.clients if m.client == "c"] == [
        (ClientStatus.OFFLINE, "store c was revoked")
    ]
    assert [names_of(record) for record in world.finished] == [["a", "b", "c"], *[["a", "b"]] * 3]
    assert world.clock.now() < 10, "it is not waited for"
    world.restart()
    world.transport.revoke("c")
    assert world.run_connected(num_rounds=5) is RunStatus.FINISHED, (
        "also when it was no longer there before the restart"
    )


@pytest.mark.parametrize("quorum", [None, 3])
@pytest.mark.parametrize("is_in_a_round", [True, False])
def test_a_restarted_server_does_not_wait_for_a_client_that_was_revoked(
    quorum: int | None, is_in_a_round: bool
) -> None:
    world = World(names=("a", "b", "c"), num_rounds=2 if is_in_a_round else 1, rounds={"quorum": quorum})

    def stop(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(message, Broadcast) and message.key.round == 2:
            world.stop.set()
        return honest

    world.tampers = {"c": stop}
    assert world.run() is (RunStatus.STOPPED if is_in_a_round else RunStatus.FINISHED)
    world.stop.clear()
    world.restart()
    world.transport.revoke("c")
    began = world.clock.now()
    assert world.run_connected(num_rounds=3) is RunStatus.FINISHED
    assert names_of(world.finished[-1]) == ["a", "b"]
    assert world.clock.now() - began < 10, "it would have 20 s to return"


def refusing(message: ServerMessage, honest: Answer) -> Answer:
    """The answer of a store that takes part in no such run."""
    return Failure(key=None, reason="its policy allows no such model") if isinstance(message, Setup) else honest


def test_a_client_that_cannot_set_up_tries_again_and_its_reason_is_recorded_once() -> None:
    world = World(names=("a", "b", "c"), num_rounds=3, rounds={"quorum": None}, delays=dict.fromkeys("ab", 5.0))
    world.plan, world.tampers = {"start_clients": 2}, {"c": refusing}
    for seconds in (1.0, 2.0):
        world.transport.connect(world.peer("c", address=f"another-line-{seconds}"), delay=seconds)
    assert world.run() is RunStatus.FINISHED
    assert [(event.client, event.reason) for event in world.sink.of(ClientRefused) if event.client == "c"] == [
        ("c", "its policy allows no such model")
    ]
    assert len(world.transport.refused) == 3
    assert not world.transport.final_refusals


def test_a_client_of_another_version_is_refused_for_good() -> None:
    def differ(message: ServerMessage, honest: Answer) -> Answer:
        return replace(honest, layout_digest="another") if isinstance(honest, Ready) else honest

    world = World(names=("a", "b"), num_rounds=1, rounds={"quorum": None}, plan={"start_clients": 1})
    world.tampers = {"b": differ}
    other = world.peer("a", address="another-line")
    world.transport.connect(replace(other, join=replace(other.join, client="c", protocol=99)))
    assert world.run() is RunStatus.FINISHED
    assert world.transport.final_refusals == {"line-to-b", "another-line"}


def test_a_configured_quorum_does_not_wait_for_who_is_excluded() -> None:
    world = World(names=("a", "b", "c", "d"), num_rounds=5, rounds={"quorum": 4})
    world.tampers = {"c": failing(will_repeat=False)}
    assert world.run() is RunStatus.FINISHED
    assert len(world.sink.of(RoundVoid)) == 3
    assert [len(record.clients) for record in world.finished] == [3] * 5


def test_clients_that_fail_in_turns_are_excluded_and_do_not_use_up_the_attempts_of_a_round() -> None:
    """Of twelve, ten fail: far more attempts at the first round are void than a run may have in a row otherwise."""
    names = tuple("abcdefghijkl")
    world = World(
        names=names, num_rounds=2, rounds={"quorum": None}, plan={"fraction": 0.25},
        tampers=dict.fromkeys("abcdefghij", failing(will_repeat=False)),
    )  # fmt: skip
    assert world.run() is RunStatus.FINISHED
    assert len(world.sink.of(RoundVoid)) > 10


def test_the_failure_of_one_does_not_end_the_run_of_those_who_are_away_for_a_moment() -> None:
    world = World(names=("a", "b"), num_rounds=2, rounds={"quorum": 1, "timeout": 50.0})
    fail: Tamper = failing(will_repeat=True)

    def leave_and_fail(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(message, Broadcast) and message.key.round == 2:
            world.transport.arrive(Left(address="line-to-b"))
            world.transport.connect(world.peer("b", address="another-line-to-b"), delay=30.0)
            return fail(message, honest)
        return honest

    world.tampers = {"a": leave_and_fail, "b": lambda m, honest: None if first_line(m) else honest}
    lines: list[int] = []

    def first_line(message: ServerMessage) -> bool:
        """Whether b is asked to train in round 2 on the line that it loses."""
        asked = isinstance(message, Broadcast) and message.key.round == 2 and message.purpose is Purpose.TRAIN
        lines.extend([1] * asked)
        return asked and len(lines) == 1

    assert world.run() is RunStatus.FINISHED
    assert statuses(world, "b")[-1] is ClientStatus.COUNTED


@pytest.mark.parametrize(
    ("purpose", "silent"), [(Purpose.TRAIN, False), (Purpose.EVALUATE, False), (Purpose.EVALUATE, True)]
)
def test_in_asynchronous_rounds_failures_exclude_alike(purpose: Purpose, silent: bool) -> None:
    def tamper(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(message, Broadcast) and message.purpose is purpose:
            return None if silent else Failure(key=message.key, reason="no disk")
        return honest

    world = World(
        names=("a", "b", "c"), num_rounds=30, algorithm=FedBuff(server_lr=1.0, buffer_size=2), rounds={"timeout": 3.0},
        delays={"a": 1.0, "b": 1.3, "c": 0.4}, tampers={"c": tamper},
    )  # fmt: skip
    assert world.run() is RunStatus.FINISHED
    excluded = world.sink.of(ClientExcluded)
    assert "3 times in a row" in excluded[0].reason
    first = excluded[0].last_round or 0
    asked = {m.key.round for m in world.transport.broadcasts("line-to-c")}
    assert not asked & set(range(first - 8, first)), "it is left alone, give or take the version then being made"
    assert max(asked) > first, "and asked again"


def test_what_a_stores_policy_refuses_is_recorded_so_and_excludes_after_three_in_a_row() -> None:
    def refuse(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(message, Broadcast) and message.purpose is Purpose.TRAIN:
            return Failure(key=message.key, reason="rounds-per-day", refused=True)
        return honest

    world = World(names=FIVE, num_rounds=5, rounds={"quorum": None}, tampers={"c": refuse})
    assert world.run() is RunStatus.FINISHED
    assert statuses(world, "c") == [ClientStatus.REFUSED] * 3
    assert [event.reason for event in world.sink.of(ClientExcluded)] == ["rounds-per-day (3 times in a row)"]
    assert [event.reason for event in world.sink.of(ClientRefused)] == ["rounds-per-day"], "told once"


@pytest.mark.parametrize("purpose", list(Purpose))
@pytest.mark.parametrize("algorithm", [FedAvg(), FedBuff(server_lr=1.0, buffer_size=2)])
def test_a_refusal_of_any_kind_of_task_is_told_once_with_its_reason(algorithm: Any, purpose: Purpose) -> None:
    def refuse(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(message, Broadcast) and message.purpose is purpose:
            return Failure(key=message.key, reason="not here", refused=True)
        return honest

    world = World(
        names=("a", "b", "c"), num_rounds=4, algorithm=algorithm, rounds={"quorum": None}, tampers={"c": refuse},
        plan={"compares": True},
    )  # fmt: skip
    assert world.run() is RunStatus.FINISHED
    (told,) = world.sink.of(ClientRefused)
    assert (told.client, told.reason.endswith("not here")) == ("c", True)


def test_a_configured_quorum_that_exclusions_lower_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    tampers = dict.fromkeys("bc", failing(will_repeat=True))
    world = World(names=("a", "b", "c"), num_rounds=3, rounds={"quorum": 2}, tampers=tampers)
    assert world.run() is RunStatus.FINISHED
    told = [record.getMessage() for record in caplog.records if "--quorum" in record.getMessage()]
    assert told == [
        "round 1: rounds now count 1 store, fewer than --quorum 2: no others can take part. Excluded: b: no disk; "
        "c: no disk"
    ]


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


@pytest.mark.parametrize("is_in_a_round", [True, False])
def test_a_restarted_server_says_for_whom_it_waits_and_how_long(is_in_a_round: bool) -> None:
    world = World(names=("a", "b", "c"), num_rounds=2 if is_in_a_round else 1, rounds={"rejoin_grace": 60.0})
    world.rounds = {**world.rounds, "quorum": None}

    def stop(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(message, Broadcast) and message.key.round == 2:
            world.stop.set()
        return honest

    world.tampers = {"c": stop}
    world.run()
    world.stop.clear()
    world.transport = FakeTransport(world.clock)
    world.transport.connect(world.peer("a"))
    assert world.run_connected(num_rounds=2) is RunStatus.FINISHED
    notices = world.sink.of(Waiting)
    assert {notice.what for notice in notices} == {"answers to round 2" if is_in_a_round else "stores to return"}
    told = [(round(notice.seconds), notice.returning, round(notice.seconds_to_return)) for notice in notices]
    assert told == [(10, ("b", "c"), 50), (30, ("b", "c"), 30)]
    assert names_of(world.finished[-1])[0] == "a"


@pytest.mark.parametrize("algorithm", [FedAvg(), FedBuff(server_lr=1.0, buffer_size=3)])
def test_a_store_that_refuses_all_evaluations_trains_as_before(algorithm: Any) -> None:
    def refuse(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(message, Broadcast) and message.purpose is Purpose.EVALUATE:
            return Failure(key=message.key, reason="evaluate = false", refused=True)
        return honest

    world = World(names=("a", "b", "c"), num_rounds=6, algorithm=algorithm, tampers={"c": refuse})
    assert world.run() is RunStatus.FINISHED
    assert set(statuses(world, "c")) == {ClientStatus.COUNTED}
    assert len(statuses(world, "c")) >= 4
    told = [event.reason for event in world.sink.of(ClientRefused) if event.client == "c"]
    assert told == ["its evaluation is not used: evaluate = false"], "told once"
    assert not world.sink.of(ClientExcluded)


def test_losses_that_all_stores_withhold_are_absent_from_the_record_and_choose_no_best_round() -> None:
    def withhold(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(honest, Evaluation):
            return replace(honest, loss_sum=None)
        return replace(honest, train_loss=None) if isinstance(honest, Upload) else honest

    stopping = EarlyStopping(metric="train_loss", patience=1)
    world = World(
        names=("a", "b"), num_rounds=3, tampers=dict.fromkeys("ab", withhold), plan={"early_stopping": stopping}
    )  # fmt: skip
    assert world.run() is RunStatus.FINISHED
    assert [(record.train_loss, record.best_round) for record in world.finished] == [(None, None)] * 3
    assert all(record.accuracy is not None for record in world.finished)


@pytest.mark.parametrize("equal", [True, False])
def test_numbers_of_photos_may_be_withheld_where_nothing_needs_them(equal: bool) -> None:
    def withhold(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(honest, Ready):
            return replace(honest, num_train=None, num_validation=None, num_left_out=None)
        return replace(honest, num_examples=None, num_steps=None) if isinstance(honest, Upload) else honest

    world = World(
        names=("a", "b", "c"), num_rounds=2, tampers={"c": withhold}, rounds={"equal_weights": equal},
        plan={"start_clients": 3 if equal else 2},
    )  # fmt: skip
    assert world.run() is RunStatus.FINISHED
    refused = [event.reason for event in world.sink.of(ClientRefused) if event.client == "c"]
    if equal:
        assert refused == []
        assert statuses(world, "c") == [ClientStatus.COUNTED] * 2
        (joined,) = (event for event in world.sink.of(ClientJoined) if event.client == "c")
        assert (joined.num_train, joined.num_validation) == (None, None)
        assert not [task for task in world.transport.broadcasts("line-to-c") if task.purpose is Purpose.EVALUATE]
    else:
        assert ["--weights equal" in reason for reason in refused] == [True]
        assert statuses(world, "c") == []


def test_stores_are_told_of_how_many_uploads_a_model_is_made() -> None:
    world = World(names=FIVE, num_rounds=1, rounds={"quorum": 3})
    world.run()
    trained = [task for task in world.transport.broadcasts("line-to-c") if task.purpose is Purpose.TRAIN]
    assert [task.quorum for task in trained] == [3]
