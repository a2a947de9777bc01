"""After the last round: all stores are asked once, and nobody's misbehavior touches the others or the model."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedshelf.algorithms.fedbuff import FedBuff
from fedshelf.compression.chain import parse
from fedshelf.compression.codec_policy import CodecPolicy
from fedshelf.core.choices import Candidate
from fedshelf.core.errors import RefusedError
from fedshelf.core.events import (
    ClientRefused,
    ComparisonReceived,
    ComparisonStarted,
    RoundFinished,
    RunEnded,
    RunStatus,
    StoreComparison,
    StoresCompared,
)
from fedshelf.core.messages import (
    Broadcast,
    Comparison,
    Failure,
    Purpose,
    ServerMessage,
    TaskKey,
    Upload,
)
from fedshelf.core.ports import Reply
from fedshelf.core.rng import Rng
from fedshelf.personalization.model_selection import FIRST_MODEL
from fedshelf.scheduling.early_stopping import EarlyStopping
from fedshelf.serialization import messages as payload
from fedshelf.storage.client_states import FileClientStates
from fedshelf.training.loop import LocalRun
from tests.fakes import Answer, Garbled, Gone
from tests.worlds import World, photos, with_batch_norm

COMPARES = {"compares": True}


def compared(world: World) -> StoresCompared:
    (event,) = world.sink.of(StoresCompared)
    return event


def store(world: World, name: str) -> StoreComparison:
    return next(store for store in compared(world).stores if store.client == name)


def on_comparison(change: Callable[[Comparison], Answer]) -> Callable[[ServerMessage, Answer], Answer]:
    """Change what a client answers in the end."""
    return lambda message, honest: change(honest) if isinstance(honest, Comparison) else honest


def world(**settings: object) -> World:
    given = {"personalize": "finetune", "plan": COMPARES, "test_photos": photos(77, 20), **settings}
    return World(**given)  # type: ignore[arg-type]


def comparisons_sent(world: World) -> list[Broadcast]:
    sent = [message for _, message in world.transport.sent]
    return [m for m in sent if isinstance(m, Broadcast) and m.purpose is Purpose.COMPARE]


def test_after_the_last_round_every_store_compares_and_keeps_a_model() -> None:
    federation = world()
    assert federation.run() is RunStatus.FINISHED
    assert [s.client for s in compared(federation).stores] == ["a", "b", "c"]
    for found in compared(federation).stores:
        kept, _ = federation.kept[found.client]
        assert (found.best, found.accuracies, found.on_test) == (kept.best, kept.accuracies, True)
        assert set(found.accuracies) == set(Candidate)
    kinds = [type(event) for event in federation.sink.events]
    assert kinds.index(ComparisonStarted) > max(i for i, kind in enumerate(kinds) if kind is RoundFinished)
    assert kinds[-2:] == [StoresCompared, RunEnded]
    assert federation.sink.of(ComparisonStarted)[0].stores == ("a", "b", "c")
    received = federation.sink.of(ComparisonReceived)
    assert [(event.num_done, event.num_stores, event.reason) for event in received] == [(n, 3, "") for n in (1, 2, 3)]
    assert federation.checkpoints.states[-1].compared == 2


def test_stores_are_sent_the_last_model_and_the_first_and_what_was_counted() -> None:
    federation = world(num_rounds=3)
    federation.run()
    (first, *_), last = federation.sink.of(ComparisonStarted), federation.final
    assert first.round == 3
    for message in comparisons_sent(federation):
        assert torch.equal(message.params, last)
        assert torch.equal(message.auxiliary[FIRST_MODEL], World().trainer("a").bound_model.params.shared)
        assert message.counted is not None
        assert message.counted.round == 3
        assert message.key.round == 3
        assert message.key != message.counted, "a late upload is no answer to it"


def test_without_comparing_nobody_is_asked() -> None:
    federation = world(plan={})
    federation.run()
    assert comparisons_sent(federation) == []
    assert not federation.sink.of(StoresCompared)


def test_comparing_changes_not_one_bit_of_the_model() -> None:
    plain, comparing = world(plan={}), world()
    plain.run()
    comparing.run()
    assert torch.equal(plain.final, comparing.final)


@pytest.mark.parametrize("method", ["none", "fedbn", "fedper", "fedrep", "ditto"])
def test_every_way_of_personalization_compares(method: str) -> None:
    federation = world(personalize=method, module=with_batch_norm)
    federation.run()
    assert all(found.best in found.accuracies for found in compared(federation).stores)
    assert sorted(federation.kept) == ["a", "b", "c"]


BAD: dict[str, tuple[Callable[[Comparison], Answer], str]] = {
    "accuracy 7": (lambda c: replace(c, accuracies={**c.accuracies, Candidate.GLOBAL: 7.0}), "accuracy of 7.0 for the"),
    "below zero": (lambda c: replace(c, accuracies={**c.accuracies, Candidate.LOCAL: -0.1}), "accuracy of -0.1"),
    "not a number": (lambda c: replace(c, accuracies={Candidate.LOCAL: math.nan}), "accuracy of nan"),
    "endless": (lambda c: replace(c, accuracies={Candidate.LOCAL: math.inf}), "accuracy of inf"),
    "a choice it says nothing of": (
        lambda c: replace(c, best=Candidate.GLOBAL, accuracies={Candidate.LOCAL: 0.5}), "says nothing of how"
    ),
    "for other work": (lambda c: replace(c, key=replace(c.key, round=1)), "for other work"),
    "more validation photos than it has": (lambda c: replace(c, num_validation=99), "99 validation photos"),
    "fewer validation photos than it came with": (lambda c: replace(c, num_validation=3), "chosen on 3 validation"),
    "unreadable": (lambda c: Garbled("the message is malformed: best: Input should be"), "best: Input should be"),
    "something else": (lambda c: Upload(
        key=c.key, vectors={"delta": torch.zeros(3)}, num_examples=1, num_steps=1, train_loss=1.0, seconds=1.0
    ), "it is not a comparison"),
    "a failure": (lambda c: Failure(key=c.key, reason="the disk is full"), "the disk is full"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_comparison_is_named_and_disturbs_nobody(kind: str) -> None:
    change, why = BAD[kind]
    honest, federation = world(), world()
    federation.tampers["b"] = on_comparison(change)
    honest.run()
    assert federation.run() is RunStatus.FINISHED
    assert (store(federation, "b").best, store(federation, "b").accuracies) == (None, {})
    assert why in store(federation, "b").reason
    for name in ("a", "c"):
        assert store(federation, name) == store(honest, name)
    assert torch.equal(federation.final, honest.final)


@pytest.mark.parametrize(
    "accuracies",
    [dict.fromkeys(Candidate, 0.0), dict.fromkeys(Candidate, 1.0), {}],
    ids=["nothing right", "all right", "no photos to judge by"],
)
def test_a_comparison_is_used_to_the_very_bounds_of_what_can_be(accuracies: dict[Candidate, float]) -> None:
    federation = world()
    federation.tampers["b"] = on_comparison(lambda c: replace(c, accuracies=accuracies))
    federation.run()
    found = store(federation, "b")
    assert (found.reason, found.accuracies, found.best) == ("", accuracies, federation.kept["b"][0].best)


def test_one_silent_store_costs_the_time_limit_of_one_round_once_half_of_the_stores_have_answered() -> None:
    federation = world(num_rounds=30, rounds={"timeout": 50.0})
    federation.tampers["b"] = on_comparison(lambda comparison: None)
    federation.run()
    assert store(federation, "b").reason == "no answer within 50 s"
    assert federation.clock.now() == pytest.approx(50, abs=5)
    assert store(federation, "a").best is not None


def test_a_slower_store_has_five_times_as_long_and_a_round_as_half_of_the_stores_took() -> None:
    honest = world(num_rounds=30, rounds={"timeout": 50.0})

    def compares_after(name: str, seconds: float) -> Callable[[ServerMessage, Answer], Answer]:
        def tamper(message: ServerMessage, answer: Answer) -> Answer:
            if not isinstance(answer, Comparison):
                return answer
            late = Reply(address=f"line-to-{name}", message=answer, num_bytes=1, task=answer.key)
            honest.transport.arrive(late, delay=seconds)
            return None

        return tamper

    for name, seconds in {"a": 10.0, "b": 20.0, "c": 149.0}.items():
        honest.tampers[name] = compares_after(name, seconds)
    honest.run()
    assert all(store(honest, name).best is not None for name in "abc"), "5 · 20 + 50 s is what half of them allow"


def test_if_all_are_silent_the_limit_is_that_of_all_rounds() -> None:
    federation = world(num_rounds=3, rounds={"timeout": 50.0})
    federation.tampers |= dict.fromkeys("abc", on_comparison(lambda comparison: None))
    federation.run()
    assert store(federation, "b").reason == "no answer within 150 s"


def test_who_leaves_is_named_and_nobody_waits_for_it() -> None:
    federation = world(rounds={"rejoin_grace": 0.0})
    federation.tampers["b"] = on_comparison(lambda comparison: Gone())
    federation.run()
    assert store(federation, "b").reason == "not connected"
    assert federation.clock.now() < 10
    assert store(federation, "c").best is not None


def test_a_store_that_took_part_and_is_gone_is_in_the_table() -> None:
    federation = world(rounds={"rejoin_grace": 0.0}, num_rounds=3)

    def leave(message: ServerMessage, honest: Answer) -> Answer:
        return Gone() if isinstance(honest, Upload) and honest.key.round == 2 else honest

    federation.tampers["b"] = leave
    federation.run()
    assert [found.client for found in compared(federation).stores] == ["a", "b", "c"]
    assert store(federation, "b").reason == "not connected"


def test_an_upload_that_comes_late_is_no_answer_and_the_comparison_still_counts() -> None:
    federation = world(num_rounds=1, rounds={"timeout": 50.0})
    late: list[Upload] = []

    def slow(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(honest, Upload):
            late.append(honest)
            return None
        if isinstance(honest, Comparison):
            reply = Reply(address="line-to-b", message=late[0], num_bytes=10, task=late[0].key)
            federation.transport.arrive(reply)
        return honest

    federation.tampers["b"] = slow
    federation.run()
    assert len(late) == 1
    assert store(federation, "b").best is not None
    assert any(r.client == "b" and "closed" in r.reason for r in federation.sink.of(ClientRefused))


def test_a_server_that_was_stopped_while_stores_compared_asks_again_and_nobody_trains_twice() -> None:
    whole = world()
    whole.run()
    federation = world()
    stop_at = iter([True])

    def stop(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(honest, Comparison) and next(stop_at, False):
            federation.stop.set()
        return honest

    def refuse(local_run: LocalRun) -> float:
        raise AssertionError("each client has its answer still")

    federation.tampers["b"] = stop
    assert federation.run() is RunStatus.STOPPED
    assert not federation.sink.of(StoresCompared)
    federation.stop.clear()
    federation.restart()
    for name in federation.names:
        work = federation.trainer(name)
        object.__setattr__(work, "run", refuse)
    assert federation.server().run() is RunStatus.FINISHED
    assert compared(federation) == compared(whole)
    assert torch.equal(federation.final, whole.final)
    assert [event.round for event in federation.sink.of(RoundFinished)] == [1, 2]


def test_clients_that_were_started_again_meanwhile_compare_anew_with_the_same_result(tmp_path: Path) -> None:
    whole = world(personalize="ditto", module=with_batch_norm)
    whole.run()
    federation = world(personalize="ditto", module=with_batch_norm)

    def restarted() -> None:
        for name in federation.names:
            federation.states[name] = FileClientStates(tmp_path / name)  # type: ignore[assignment]
            federation.clients[name] = federation.client(name)

    def stop(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(honest, Comparison):
            federation.stop.set()
        return honest

    restarted()
    federation.tampers["b"] = stop
    federation.run()
    del federation.tampers["b"]
    federation.stop.clear()
    restarted()
    federation.restart()
    federation.server().run()
    assert compared(federation) == compared(whole)
    for name in federation.names:
        assert torch.equal(federation.kept[name][1], whole.kept[name][1])


def test_a_run_that_has_compared_is_done_and_an_extended_one_compares_anew() -> None:
    federation = world()
    federation.run()
    federation.restart()
    federation.server().run()
    assert len(federation.sink.of(StoresCompared)) == 1, "nothing is left to do"
    federation.num_rounds = 3
    federation.restart()
    federation.server().run()
    assert [event.round for event in federation.sink.of(StoresCompared)] == [2, 3]
    longer = world(num_rounds=3)
    longer.run()
    assert federation.sink.of(StoresCompared)[-1] == compared(longer)


def test_a_finished_run_can_be_asked_to_compare_afterwards() -> None:
    federation = world(plan={})
    federation.run()
    federation.restart()
    assert federation.run_connected(compares=True) is RunStatus.FINISHED
    assert compared(federation).round == 2
    assert len(federation.finished) == 2


def test_a_run_that_stops_early_compares_and_stores_train_alone_for_as_many_rounds() -> None:
    """Nobody learns anything: no round is better than the first."""
    federation = world(
        num_rounds=9, plan={**COMPARES, "client_lr": lambda number: 0.0, "early_stopping": EarlyStopping(patience=2)}
    )
    federation.run()
    assert compared(federation).round == len(federation.finished) == 3
    assert {message.key.round for message in comparisons_sent(federation)} == {3}


def test_compressed_downloads_bring_the_last_model_to_the_comparison() -> None:
    codec_policy = CodecPolicy(codec=parse("int8"), byte_budget=None, rng=Rng(0))
    federation = world(plan={**COMPARES, "downloads": codec_policy}, num_rounds=3)
    federation.run()
    assert all(found.best is not None for found in compared(federation).stores)
    sent = [m for _, m in federation.transport.sent if isinstance(m, Broadcast) and not m.is_plain]
    assert {m.purpose for m in sent} == set(Purpose)
    assert all(not message.is_plain for message in comparisons_sent(federation))


def test_asynchronous_rounds_end_with_a_comparison_too() -> None:
    federation = world(algorithm=FedBuff(buffer_size=2, server_lr=1.0), num_rounds=3)
    assert federation.run() is RunStatus.FINISHED
    assert compared(federation).round == 3
    assert all(found.best is not None for found in compared(federation).stores)


@pytest.mark.parametrize("codec", [None, "int8"])
@pytest.mark.parametrize(("versions", "buffer_size", "expected"), [(8, 2, 5), (1, 1, 1)])
def test_after_asynchronous_rounds_a_model_alone_gets_as_many_as_a_store_had_on_average(
    codec: str | None, versions: int, buffer_size: int, expected: int
) -> None:
    """Of three stores; after synchronous rounds it gets as many as there were."""
    plan = (
        COMPARES
        if codec is None
        else {**COMPARES, "downloads": CodecPolicy(codec=parse(codec), byte_budget=None, rng=Rng(0))}
    )
    federation = world(algorithm=FedBuff(buffer_size=buffer_size, server_lr=1.0), num_rounds=versions, plan=plan)
    federation.run()
    sent = [m for _, m in federation.transport.sent if isinstance(m, Broadcast)]
    assert {m.num_rounds for m in sent if m.purpose is Purpose.COMPARE} == {expected}
    assert {m.num_rounds for m in sent if m.purpose is not Purpose.COMPARE} == {None}


def test_a_choice_that_there_is_not_is_refused_where_the_message_is_read() -> None:
    key = TaskKey(run_id="run-1", round=2, attempt=1)
    honest = Comparison(
        key=key, best=Candidate.LOCAL, accuracies={Candidate.LOCAL: 0.5}, on_test=True, num_validation=4
    )  # fmt: skip
    header = payload.encode_header(honest, "")
    assert payload.encode_header(payload.decode(header, b""), "") == header
    for wrong in (header.replace('"best":"local"', '"best":"mine"'), header.replace('"local":0.5', '"mine":0.5')):
        assert wrong != header
        with pytest.raises(RefusedError, match="the comparison is malformed"):
            payload.decode(wrong, b"")
