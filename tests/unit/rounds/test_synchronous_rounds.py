"""Rounds on fake ports: who is counted, who is not and why, and that nobody's misbehavior touches the result."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedshelf.algorithms.fedavg import FedAvg
from fedshelf.core.errors import RunError
from fedshelf.core.events import (
    ClientJoined,
    ClientLeft,
    ClientRefused,
    ClientStatus,
    RoundFinished,
    RoundStarted,
    RoundVoid,
    RunEnded,
    RunStarted,
    RunStatus,
    UploadReceived,
)
from fedshelf.core.messages import (
    PROTOCOL_VERSION,
    Broadcast,
    ClassFolder,
    Evaluation,
    Failure,
    ProductCount,
    Purpose,
    Ready,
    ServerMessage,
    Setup,
    TaskKey,
    Upload,
    auxiliary_vectors,
)
from fedshelf.core.ports import Left, Reply
from fedshelf.core.rng import Rng
from fedshelf.core.state import ClientState
from fedshelf.rounds import validation as checks
from fedshelf.scheduling.early_stopping import EarlyStopping
from fedshelf.serialization import messages as payload
from fedshelf.training.trainer import Trainer
from tests.fakes import Answer, FakePeer, Garbled, Gone
from tests.worlds import World, join, with_batch_norm

FOUR = ("a", "b", "c", "d")


def statuses(record: RoundFinished | RoundVoid) -> dict[str, str]:
    return {member.client: member.status.value for member in record.clients}


def reason(record: RoundFinished | RoundVoid, client: str) -> str:
    return next(member.reason for member in record.clients if member.client == client)


def on_training(change: Callable[[Upload], Answer], *, rounds: range = range(1, 100)) -> Any:
    """Change what a client answers to the training tasks of some rounds."""

    def tamper(message: ServerMessage, honest: Answer) -> Answer:
        return change(honest) if isinstance(honest, Upload) and honest.key.round in rounds else honest

    return tamper


def final_without(client: str, **settings: Any) -> Tensor:
    """The result of a run in which that client never answers a training task."""
    world = World(names=FOUR, **settings)
    world.tampers[client] = on_training(lambda upload: None)
    world.run()
    assert all(statuses(record)[client] == "late" for record in world.finished)
    return world.final


def with_value(vector: Tensor, index: int, value: float) -> Tensor:
    changed = vector.clone()
    changed[index] = value
    return changed


BAD_UPLOADS: dict[str, tuple[Callable[[Upload], Answer], str]] = {
    "not a number": (
        lambda u: replace(u, vectors={**u.vectors, "delta": with_value(u.delta, 5, math.nan)}),
        r"nan in tensor '1.weight'",
    ),
    "infinite": (
        lambda u: replace(u, vectors={**u.vectors, "delta": with_value(u.delta, -1, math.inf)}),
        r"inf in tensor '1.bias'",
    ),
    "of wrong shape": (
        lambda u: replace(u, vectors={**u.vectors, "delta": u.delta[:-1]}),
        r"shape \(146,\), the server's layout \(147,\)",
    ),
    "for an earlier round": (lambda u: replace(u, key=replace(u.key, round=0)), r"round 0, attempt 1 .* stale"),
    "for an earlier attempt": (lambda u: replace(u, key=replace(u.key, attempt=7)), r"attempt 8"),
    "of another run": (lambda u: replace(u, key=replace(u.key, run_id="run-0")), r"run run-0"),
    "with an undeclared vector": (
        lambda u: replace(u, vectors={**u.vectors, **auxiliary_vectors({"photo": u.delta})}),
        r"\['photo'\]",
    ),
    "truncated": (lambda u: Garbled("the body is truncated"), r"the body is truncated"),
    "without examples": (lambda u: replace(u, num_examples=0), r"claims 0 examples"),
    "with negative examples": (lambda u: replace(u, num_examples=-5), r"claims -5 examples"),
    "with negative steps": (lambda u: replace(u, num_steps=-1), r"-1 steps"),
    "with a loss that is no number": (lambda u: replace(u, train_loss=math.nan), r"not finite"),
    "with endless seconds": (lambda u: replace(u, seconds=math.inf), r"not finite"),
}


@pytest.fixture(scope="module")
def unharmed() -> Tensor:
    return final_without("c", num_rounds=2)


@pytest.mark.parametrize("kind", BAD_UPLOADS)
def test_a_bad_upload_is_refused_by_name_and_the_round_is_unharmed(kind: str, unharmed: Tensor) -> None:
    change, why = BAD_UPLOADS[kind]
    world = World(names=FOUR)
    world.tampers["c"] = on_training(change)
    assert world.run() is RunStatus.FINISHED
    assert len(world.finished) == 2
    for record in world.finished:
        assert statuses(record) == {"a": "counted", "b": "counted", "c": "refused", "d": "counted"}
        assert re.search(why, reason(record, "c")), reason(record, "c")
    assert torch.equal(world.final, unharmed)
    assert not world.sink.of(RoundVoid)


def test_a_client_that_fails_says_why_and_the_round_is_unharmed(unharmed: Tensor) -> None:
    world = World(names=FOUR)
    world.tampers["c"] = on_training(lambda u: Failure(key=u.key, reason="the disk is full"))
    world.run()
    assert [statuses(r)["c"] for r in world.finished] == ["failed", "failed"]
    assert reason(world.finished[0], "c") == "the disk is full"
    assert torch.equal(world.final, unharmed)


def test_a_client_that_is_too_slow_is_late_and_the_round_is_unharmed(unharmed: Tensor) -> None:
    world = World(names=FOUR, rounds={"timeout": 50.0})
    world.tampers["c"] = on_training(lambda u: None)
    world.run()
    assert statuses(world.finished[0])["c"] == "late"
    assert reason(world.finished[0], "c") == "no answer within 50 s"
    assert world.finished[0].seconds == pytest.approx(50)
    assert torch.equal(world.final, unharmed)


def test_a_client_that_is_gone_is_offline_at_once_and_the_round_is_unharmed(unharmed: Tensor) -> None:
    world = World(names=FOUR, rounds={"rejoin_grace": 0.0})
    world.tampers["c"] = on_training(lambda u: Gone())
    world.run()
    first, second = world.finished
    assert statuses(first)["c"] == "offline"
    assert reason(first, "c") == "not connected"
    assert first.seconds < 5, "nobody waits for the deadline"
    assert "c" not in statuses(second), "it is not drawn while it is away"
    assert [event.client for event in world.sink.of(ClientLeft)] == ["c"]
    assert torch.equal(world.final, unharmed)


def test_a_late_answer_of_a_closed_round_does_not_disturb_the_next(unharmed: Tensor) -> None:
    honest = World(names=FOUR)
    honest.tampers["c"] = on_training(lambda u: None, rounds=range(1, 2))
    honest.run()

    world = World(names=FOUR, rounds={"timeout": 50.0})
    late: list[Upload] = []

    def slow(message: ServerMessage, answer: Answer) -> Answer:
        if isinstance(answer, Upload) and answer.key.round == 1:
            late.append(answer)
            return None
        if isinstance(answer, Upload):  # round 2: first the old answer arrives, as one to the old task
            reply = Reply(address="line-to-c", message=late[0], num_bytes=10, task=late[0].key)
            world.transport.arrive(reply)
        return answer

    world.tampers["c"] = slow
    world.run()
    assert [statuses(record)["c"] for record in world.finished] == ["late", "counted"]
    assert torch.equal(world.final, honest.final)
    assert any(r.client == "c" and "closed" in r.reason for r in world.sink.of(ClientRefused))


def test_an_upload_that_names_the_old_round_in_answer_to_the_new_is_refused() -> None:
    world = World(names=FOUR)
    kept: list[Upload] = []

    def replay(upload: Upload) -> Answer:
        kept.append(upload)
        return kept[0]

    world.tampers["c"] = on_training(replay)
    world.run()
    assert [statuses(record)["c"] for record in world.finished] == ["counted", "refused"]


def test_enough_uploads_at_the_deadline_make_a_round() -> None:
    world = World(names=FOUR, num_rounds=1, rounds={"timeout": 50.0, "quorum": 2})
    for name in ("c", "d"):
        world.tampers[name] = on_training(lambda u: None)
    assert world.run() is RunStatus.FINISHED
    assert statuses(world.finished[0]) == {"a": "counted", "b": "counted", "c": "late", "d": "late"}
    assert not world.sink.of(RoundVoid)


@pytest.mark.parametrize("misbehavior", [None, Garbled()])
def test_fewer_than_the_quorum_make_the_attempt_void_and_it_is_tried_again(misbehavior: Answer) -> None:
    """With Garbled all have answered before the deadline; with None the deadline passes."""
    world = World(names=FOUR, rounds={"timeout": 50.0, "quorum": 3})
    for name in ("c", "d"):
        tries: list[Upload] = []

        def once(upload: Upload, tries: list[Upload] = tries) -> Answer:
            tries.append(upload)
            return misbehavior if len(tries) == 1 else upload

        world.tampers[name] = on_training(once)
    assert world.run() is RunStatus.FINISHED
    (void,) = world.sink.of(RoundVoid)
    assert (void.round, void.attempt) == (1, 0)
    assert void.reason == "counted 2 of 4, the quorum is 3"
    assert statuses(void)["a"] == "counted"
    assert statuses(void)["c"] == ("refused" if misbehavior else "late")
    assert [(r.round, r.attempt) for r in world.finished] == [(1, 1), (2, 0)]
    assert world.checkpoints.states[-1].void_rounds == 1
    honest = World(names=FOUR)
    honest.run()
    assert torch.equal(world.final, honest.final), "nothing of the void attempt is in the model"


def test_ten_void_attempts_in_a_row_fail_the_run_with_what_to_do() -> None:
    world = World(names=FOUR, rounds={"timeout": 5.0, "quorum": 4})
    world.tampers["a"] = on_training(lambda u: None)
    with pytest.raises(RunError, match=r"round 1 was void 10 times .*--round-timeout.*--quorum"):
        world.run()
    assert [v.attempt for v in world.sink.of(RoundVoid)] == list(range(10))
    assert world.sink.of(RunEnded)[-1].status is RunStatus.FAILED
    assert "void 10 times" in (world.transport.closed or "")
    assert not world.checkpoints.states


def test_void_attempts_are_counted_in_a_row_only() -> None:
    world = World(names=("a", "b"), num_rounds=4, rounds={"timeout": 5.0, "quorum": 2})
    tries: list[Upload] = []

    def mostly(upload: Upload) -> Answer:
        tries.append(upload)
        return upload if len(tries) % 6 == 0 else None  # five void attempts before each round: 20 in all

    world.tampers["a"] = on_training(mostly)
    assert world.run() is RunStatus.FINISHED
    assert world.checkpoints.states[-1].void_rounds == len(world.sink.of(RoundVoid)) == 20
    assert [r.attempt for r in world.finished] == [5] * 4


def test_a_client_that_comes_back_in_the_middle_of_a_round_gets_its_task_again() -> None:
    world = World(names=FOUR, num_rounds=1, rounds={"quorum": 4})
    asked: list[Upload] = []

    def restart(upload: Upload) -> Answer:
        asked.append(upload)
        if len(asked) == 1:
            peer = world.peer("c", address="new-line-to-c")
            world.transport.connect(peer, delay=2.0)  # before the old line is known to be gone
            world.transport.arrive(Left(address="line-to-c"), delay=4.0)
            return None
        return upload

    world.tampers["c"] = on_training(restart)
    world.delays["d"] = 10.0
    world.run()
    (record,) = world.finished
    assert set(statuses(record).values()) == {"counted"}
    tasks = [m.key for m in world.transport.broadcasts("new-line-to-c") if m.purpose is Purpose.TRAIN]
    assert tasks == [m.key for m in world.transport.broadcasts("line-to-c") if m.purpose is Purpose.TRAIN]
    assert not world.sink.of(ClientLeft), "the old line's end is no departure"
    honest = World(names=FOUR, num_rounds=1)
    honest.run()
    assert torch.equal(world.final, honest.final)


def test_a_name_is_free_again_once_its_holder_has_left() -> None:
    world = World(names=("a", "b"), num_rounds=1)
    world.transport.connect(world.peer("a", address="old"))
    world.transport.arrive(Left(address="old"))
    world.transport.connect(world.peer("a", address="new"))
    world.transport.connect(world.peer("b"))
    world.run_connected()
    assert not world.transport.refused
    assert world.transport.broadcasts("new")


def test_one_connection_holds_one_name() -> None:
    """Or a hostile one could hold many, each waited for to the end of time."""
    world = World(names=("a", "b"), num_rounds=1, rounds={"timeout": 50.0})
    world.connect_all()
    for name in ("x", "y", "z"):
        world.transport.connect(FakePeer(join=join(name), answer=world.peer("b").answer, address="line-to-b"))
    world.run_connected(start_clients=2)
    assert {event.client for event in world.sink.of(ClientLeft)} <= {"b", "x", "y"}
    assert len(world.sink.of(RoundStarted)[0].cohort) == 2
    assert {m.client for r in world.finished for m in r.clients} == {"a", "z"}


HANDSHAKES: dict[str, tuple[Callable[[Ready], Answer], str]] = {
    "layout": (lambda r: replace(r, layout_digest="other"), "layout digest differs"),
    "catalogue": (lambda r: replace(r, catalogue_digest="other"), "catalogue digest differs"),
    "configuration": (lambda r: replace(r, config_digest="other"), "config digest differs"),
    "run": (lambda r: replace(r, run_id="other"), "run id differs"),
    "no photos": (lambda r: replace(r, num_train=0), "no training photo"),
    "cannot set up": (lambda r: Failure(reason="model 'vit' is unknown"), "model 'vit' is unknown"),
}


@pytest.mark.parametrize("kind", HANDSHAKES)
def test_a_client_that_means_something_else_is_refused_by_name(kind: str) -> None:
    change, why = HANDSHAKES[kind]
    world = World(names=FOUR, num_rounds=1, plan={"start_clients": 3})
    world.tampers["c"] = lambda message, honest: change(honest) if isinstance(honest, Ready) else honest
    assert world.run() is RunStatus.FINISHED
    assert why in world.transport.refused["line-to-c"]
    assert [(e.client, why in e.reason) for e in world.sink.of(ClientRefused)] == [("c", True)]
    assert "c" not in statuses(world.finished[0])
    assert {e.client for e in world.sink.of(ClientJoined)} == {"a", "b", "d"}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"protocol": PROTOCOL_VERSION + 1}, f"protocol {PROTOCOL_VERSION + 1}"),
        ({"client": "  "}, "name is empty"),
        ({"classes": ()}, "it names no product"),
        ({"classes": (ClassFolder(leaf="", path=""),)}, "class"),
        ({"classes": (ClassFolder(leaf="red", path="apple//red"),)}, "class"),
    ],
)
def test_an_unusable_introduction_is_refused_and_hurts_nobody(changes: dict[str, Any], why: str) -> None:
    world = World(names=("a", "b"), num_rounds=1)
    peer = FakePeer(join=replace(join("z"), **changes), answer=lambda message: None, address="odd")
    world.transport.connect(peer)
    assert world.run() is RunStatus.FINISHED
    assert why in world.transport.refused["odd"]
    assert [m.client for m in world.finished[0].clients] == ["a", "b"]


def test_a_claim_of_a_trillion_photos_is_capped() -> None:
    def result(claim: int) -> Tensor:
        world = World(names=("a", "b"), num_rounds=1, rounds={"max_examples": 20})
        world.tampers["a"] = on_training(lambda u: replace(u, num_examples=claim))
        world.run()
        assert world.finished[0].clients[0].num_examples == min(claim, 20)
        return world.final

    assert torch.equal(result(10**12), result(20))
    assert torch.equal(result(21), result(20))
    assert not torch.equal(result(19), result(20))


def test_a_claim_of_a_trillion_validation_photos_does_not_decide_the_accuracy() -> None:
    world = World(names=("a", "b"), num_rounds=1, rounds={"max_examples": 4})

    def boast(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(honest, Ready):
            return replace(honest, num_validation=10**12)
        products = (ProductCount(index=0, correct=0, total=10**12),)
        figures: dict[str, Any] = {"num_correct": 0, "num_examples": 10**12, "products": products, "levels": (0,)}
        return replace(honest, **figures) if isinstance(honest, Evaluation) else honest

    def honest_and_right(message: ServerMessage, honest: Answer) -> Answer:
        if not isinstance(honest, Evaluation):
            return honest
        right = tuple(replace(product, correct=product.total) for product in honest.products)
        return replace(honest, num_correct=honest.num_examples, products=right, levels=(honest.num_examples,))

    world.tampers = {"a": boast, "b": honest_and_right}
    world.run()
    assert world.finished[0].accuracy == pytest.approx(0.5)
    report = world.finished[0].report
    assert report is not None
    assert (report.levels, report.num_photos) == ((4,), 8)
    assert sum(product.total for product in report.products) == 8


def test_accuracy_is_weighted_by_validation_photos_and_loss_by_training_photos() -> None:
    world = World(names=("a", "b"), num_rounds=1)
    correct, validation, loss, examples = {"a": 1, "b": 8}, {"a": 2, "b": 8}, {"a": 3.0, "b": 1.0}, {"a": 30, "b": 10}
    for name in world.names:

        def fixed(message: ServerMessage, honest: Answer, name: str = name) -> Answer:
            match honest:
                case Ready():
                    return replace(honest, num_validation=validation[name])
                case Upload():
                    return replace(honest, train_loss=loss[name], num_examples=examples[name])
                case Evaluation():
                    return Evaluation(
                        key=honest.key, num_correct=correct[name], num_examples=validation[name],
                        loss_sum=honest.loss_sum,
                    )  # fmt: skip
            return honest

        world.tampers[name] = fixed
    world.run()
    (record,) = world.finished
    assert record.accuracy == pytest.approx((1 + 8) / 10)
    assert record.train_loss == pytest.approx((3 * 30 + 1 * 10) / 40)
    assert [m.accuracy for m in record.clients] == [0.5, 1.0]


@pytest.mark.parametrize(
    "change",
    [
        lambda e: replace(e, num_correct=e.num_examples + 1),
        lambda e: replace(e, num_correct=-1),
        lambda e: replace(e, key=replace(e.key, round=0)),
        lambda e: Failure(key=e.key, reason="the disk is full"),
        lambda e: Garbled("truncated"),
    ],
)
def test_an_evaluation_that_cannot_be_is_not_used_and_named(change: Callable[[Evaluation], Answer]) -> None:
    world = World(names=("a", "b"), num_rounds=1)
    world.tampers["a"] = lambda m, h: change(h) if isinstance(h, Evaluation) else h
    world.run()
    (record,) = world.finished
    assert record.clients[0].accuracy is None
    assert record.clients[0].status is ClientStatus.COUNTED
    assert record.accuracy == record.clients[1].accuracy is not None
    assert any(e.client == "a" and "evaluation" in e.reason for e in world.sink.of(ClientRefused))


def test_answers_of_strangers_are_named_and_ignored() -> None:
    world = World(names=("a", "b"), num_rounds=1)
    world.connect_all()
    stranger = Reply(address="nobody", message=None, reason="noise", num_bytes=1)
    world.transport.arrive(stranger)
    world.transport.arrive(Reply(address="nobody", message=Failure(reason="x"), num_bytes=1))
    world.run_connected()
    assert "nobody" in {e.client for e in world.sink.of(ClientRefused)}
    assert set(statuses(world.finished[0])) == {"a", "b"}


def test_what_is_sent_and_received_is_counted_in_bytes() -> None:
    world = World(names=("a", "b"), num_rounds=1)
    world.run()
    down = sum(sum(payload.size(m)) for m in world.transport.broadcasts())
    (record,) = world.finished
    assert record.bytes_down == down
    assert record.bytes_up > 2 * 4 * len(world.final)
    assert len(world.transport.broadcasts()) == 4, "two to train, two to evaluate"


def test_the_model_that_is_evaluated_is_the_one_after_the_round() -> None:
    world = World(names=("a", "b"), num_rounds=1, module=with_batch_norm)
    world.run()
    train, evaluate = (
        [m for m in world.transport.broadcasts("line-to-a") if m.purpose is purpose]
        for purpose in (Purpose.TRAIN, Purpose.EVALUATE)
    )
    assert torch.equal(evaluate[0].params, world.final)
    assert not torch.equal(train[0].params, world.final)
    assert evaluate[0].key == train[0].key


def test_variances_never_fall_below_zero() -> None:
    world = World(names=("a", "b"), num_rounds=1, module=with_batch_norm)
    for name in world.names:
        world.tampers[name] = on_training(
            lambda u: replace(u, vectors={**u.vectors, "delta": torch.full_like(u.delta, -2.0)})
        )
    world.run()
    assert world.final[-4:].tolist() == [0.0] * 4, "running variances"
    assert world.final[-8:-4].max() < -1, "running means may be anything"


def test_events_tell_the_whole_story_in_order() -> None:
    world = World(names=("a", "b"), num_rounds=1)
    world.run()
    kinds = [type(e).__name__ for e in world.sink.events]
    assert kinds == [
        "RunStarted", "ClientJoined", "ClientJoined", "RoundStarted", "UploadReceived", "UploadReceived",
        "RoundFinished", "RunEnded",
    ]  # fmt: skip
    assert [e.num_done for e in world.sink.of(UploadReceived)] == [1, 2]
    (started,) = world.sink.of(RunStarted)
    assert (started.num_parameters, started.num_classes, started.first_round) == (147, 3, 1)
    assert world.transport.closed == "the run is finished"


def test_a_stop_ends_cleanly_and_the_next_start_goes_on() -> None:
    uninterrupted = World(num_rounds=3)
    uninterrupted.run()

    world = World(num_rounds=3)

    def stop(upload: Upload) -> Answer:
        world.stop.set()
        return upload

    world.tampers["b"] = on_training(stop, rounds=range(2, 3))
    assert world.run() is RunStatus.STOPPED
    assert world.sink.of(RunEnded)[-1].status is RunStatus.STOPPED
    assert world.transport.closed is None, "clients wait for the server to come back"
    assert len(world.finished) == 1
    world.stop.clear()
    world.tampers.clear()
    world.restart()
    assert world.server().run() is RunStatus.FINISHED
    assert [s.first_round for s in world.sink.of(RunStarted)] == [1, 2]
    assert torch.equal(world.final, uninterrupted.final)


def test_a_finished_run_started_again_does_nothing_and_is_finished() -> None:
    world = World()
    world.run()
    before = len(world.checkpoints.states)
    world.restart()
    assert world.server().run() is RunStatus.FINISHED
    assert len(world.checkpoints.states) == before
    assert not world.transport.sent


def test_a_checkpoint_of_another_model_is_an_error_that_says_so() -> None:
    world = World()
    world.run()
    other = World(module=with_batch_norm, num_rounds=3)
    other.checkpoints = world.checkpoints
    with pytest.raises(RunError, match=r"147 values, the model 323"):
        other.run()


def test_a_server_restarted_in_evaluation_still_asks_everyone_for_their_accuracy() -> None:
    """All uploads were spooled, so nobody is live when the round is folded: the accuracy must not be lost for that."""
    uninterrupted = World(num_rounds=1)
    uninterrupted.run()

    world = World(num_rounds=1)
    answered = []

    def stop_at_evaluation(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(message, Broadcast) and message.purpose is Purpose.EVALUATE:
            answered.append(message)
            world.stop.set()
            return None
        return honest

    world.tampers["a"] = stop_at_evaluation
    assert world.run() is RunStatus.STOPPED
    assert answered
    world.stop.clear()
    world.tampers.clear()
    world.restart()
    assert world.server().run() is RunStatus.FINISHED
    assert world.finished[-1].accuracy == uninterrupted.finished[-1].accuracy is not None
    assert torch.equal(world.final, uninterrupted.final)
    assert not [m for m in world.transport.broadcasts() if m.purpose is Purpose.TRAIN], "nobody trains twice"


def accuracies(world: World, by_round: dict[int, int]) -> None:
    """Let each client's correct answers after a round be as scripted, of 4."""
    for name in world.names:
        world.tampers[name] = lambda m, h: (
            replace(h, num_correct=by_round[h.key.round], num_examples=4) if isinstance(h, Evaluation) else h
        )


def test_the_best_round_is_kept_and_published_and_of_equals_the_earlier() -> None:
    world = World(num_rounds=5)
    accuracies(world, {1: 1, 2: 3, 3: 2, 4: 3, 5: 0})
    world.run()
    assert [r.best_round for r in world.finished] == [1, 2, 2, 2, 2]
    assert world.published == [(1, True), (2, True), (5, False)]
    assert world.checkpoints.best is not None
    assert world.checkpoints.best.round == 2


def test_patience_ends_the_run_early_and_a_restart_does_not_go_on() -> None:
    world = World(num_rounds=9, plan={"early_stopping": EarlyStopping(patience=2)})
    accuracies(world, {1: 1, 2: 3, 3: 2, 4: 3, 5: 4})
    assert world.run() is RunStatus.FINISHED
    assert [r.round for r in world.finished] == [1, 2, 3, 4]
    assert "2 rounds without improvement on round 2" in world.sink.of(RunEnded)[-1].reason
    assert world.published[-1] == (4, False), "the last model is published, too"
    world.restart()
    assert world.server().run() is RunStatus.FINISHED
    assert len(world.finished) == 4


def record(**values: Any) -> RoundFinished:
    fields: dict[str, Any] = dict.fromkeys(
        ("train_loss", "accuracy", "central_accuracy", "central_loss", "best_round")
    )  # fmt: skip
    return RoundFinished(
        round=1, attempt=0, clients=(), seconds=0.0, bytes_up=0, bytes_down=0, **{**fields, **values}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "values", "expected"),
    [
        ("auto", {"accuracy": 0.5, "central_accuracy": 0.7, "train_loss": 2.0}, 0.5),
        ("auto", {"central_accuracy": 0.7, "train_loss": 2.0}, 0.7),
        ("auto", {"train_loss": 2.0}, -2.0),
        ("auto", {}, None),
        ("central_accuracy", {"accuracy": 0.5, "central_accuracy": 0.7}, 0.7),
        ("train_loss", {"accuracy": 0.5, "train_loss": 2.0}, -2.0),
        ("accuracy", {"central_accuracy": 0.7}, None),
    ],
)
def test_the_chosen_metric_decides_and_more_is_better(metric: Any, values: dict[str, float], expected: Any) -> None:
    best = EarlyStopping(metric=metric).better(record(**values), None)
    assert (best.value if best else None) == expected


def test_values_of_different_metrics_are_never_compared() -> None:
    """A round in which every client vanished before evaluating has a central accuracy only."""
    first = EarlyStopping().better(record(accuracy=0.5, central_accuracy=0.6), None)
    assert EarlyStopping().better(record(central_accuracy=0.9), first) == first
    better = EarlyStopping().better(record(accuracy=0.6, central_accuracy=0.1), first)
    assert better is not None
    assert better.value == 0.6


def test_later_joiners_take_part_from_the_next_round() -> None:
    world = World(names=("a", "b"), num_rounds=2)
    world.tampers["a"] = on_training(lambda u: u)
    world.delays["a"] = 5.0
    late = World(names=("z",))
    peer = late.peer("z")
    world.transport.connect(peer, delay=8.0)
    assert world.run() is RunStatus.FINISHED
    assert [sorted(statuses(r)) for r in world.finished] == [["a", "b"], ["a", "b", "z"]]


def test_a_fraction_of_the_clients_is_drawn_anew_each_round_and_again_the_same() -> None:
    def cohorts() -> list[tuple[str, ...]]:
        world = World(names=tuple("abcdefgh"), num_rounds=6, plan={"fraction": 0.5, "rng": Rng(1)})
        world.run()
        return [event.cohort for event in world.sink.of(RoundStarted)]

    drawn = cohorts()
    assert drawn == cohorts()
    assert all(len(cohort) == 4 and list(cohort) == sorted(cohort) for cohort in drawn)
    assert len(set(drawn)) > 1
    assert set().union(*drawn) == set("abcdefgh")


def test_clients_are_told_which_upload_was_counted() -> None:
    world = World(names=("a", "b"), num_rounds=3, rounds={"quorum": 1, "timeout": 10.0})
    world.tampers["b"] = on_training(lambda u: None, rounds=range(2, 3))
    world.run()
    told = {
        address[-1]: [m.counted.round if m.counted else None for m in world.transport.broadcasts(address)
                      if m.purpose is Purpose.TRAIN]
        for address in ("line-to-a", "line-to-b")
    }  # fmt: skip
    assert told == {"a": [None, 1, 2], "b": [None, 1, 1]}


def test_the_learning_rate_of_the_round_is_sent() -> None:
    world = World(names=("a",), num_rounds=3, plan={"client_lr": lambda number: 0.1 * number})
    world.run()
    rates = [m.client_lr for m in world.transport.broadcasts() if m.purpose is Purpose.TRAIN]
    assert rates == pytest.approx([0.1, 0.2, 0.3])


def test_setups_are_sent_once_the_catalogue_is_settled_and_to_later_joiners_at_once() -> None:
    world = World(names=("a", "b"), num_rounds=1)
    world.run()
    setups = [m for _, m in world.transport.sent if isinstance(m, Setup)]
    assert len(setups) == 2
    assert setups[0] == setups[1]
    assert world.catalogue is not None
    assert setups[0].catalogue == world.catalogue.to_json()


def test_the_first_bad_value_is_found_in_any_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "BLOCK", 10)
    world = World(names=("a", "b"), num_rounds=1)
    world.tampers["a"] = on_training(
        lambda u: replace(u, vectors={**u.vectors, "delta": with_value(u.delta, -2, math.nan)})
    )
    world.run()
    assert "nan in tensor '1.bias'" in reason(world.finished[0], "a")


def test_nothing_of_an_earlier_round_stays_spooled() -> None:
    world = World(names=("a", "b"), num_rounds=3)
    world.run()
    keys = [TaskKey(run_id="run-1", round=number, attempt=0) for number in (1, 2, 3)]
    assert [len(world.spool.names(key)) for key in keys] == [0, 0, 0]


@dataclass(frozen=True)
class CountingRounds(FedAvg):
    """Each client uploads in how many counted rounds it has been, this one included."""

    def client_round(self, broadcast: Broadcast, state: ClientState, trainer: Trainer) -> tuple[Upload, ClientState]:
        count = state.algorithm.get("count", torch.zeros(1)) + 1
        upload = trainer.upload(broadcast)
        return replace(upload, vectors={**upload.vectors, "delta": count.expand_as(upload.delta)}), ClientState(
            algorithm={"count": count}
        )


def test_a_client_s_state_holds_once_its_upload_was_counted_and_not_before() -> None:
    world = World(names=("a", "b"), num_rounds=4, algorithm=CountingRounds())
    sent: list[float] = []

    def late_in_round_two(upload: Upload) -> Answer:
        sent.append(upload.delta[0].item())
        return None if upload.key.round == 2 else upload

    world.tampers["b"] = on_training(late_in_round_two)
    world.run()
    assert sent == [1, 2, 2, 3], "what was late in round 2 was rolled back in round 3"


def test_a_client_that_came_back_after_a_restart_and_left_again_is_not_waited_for() -> None:
    world = World(names=("a", "b"), num_rounds=1, rounds={"rejoin_grace": 60.0})

    def stop(upload: Upload) -> Answer:
        world.stop.set()
        return None

    world.tampers["a"] = on_training(stop)
    assert world.run() is RunStatus.STOPPED
    world.stop.clear()
    world.tampers["a"] = on_training(lambda u: Gone())
    world.restart()
    world.server().run()
    assert statuses(world.finished[0]) == {"a": "offline", "b": "counted"}
    assert world.finished[0].seconds < 5


def test_clients_drawn_by_size_count_alike() -> None:
    """Otherwise a store would count by its photos twice."""
    world = World(num_rounds=1, plan={"sampling": "size"}, rounds={"equal_weights": True})
    deltas: list[Tensor] = []

    def note(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(honest, Upload):
            deltas.append(honest.delta)
        return honest

    world.tampers = dict.fromkeys(world.names, note)
    start = world.trainer("a").bound_model.params.shared.clone()
    world.run()
    assert len({member.num_examples for member in world.finished[0].clients}) > 1
    torch.testing.assert_close(world.final, start + torch.stack(deltas).mean(0), rtol=1e-6, atol=1e-7)


def test_who_was_there_is_counted_in_every_round_and_outlives_a_restart() -> None:
    world = World(num_rounds=2)
    world.run()
    world.num_rounds, world.names = 4, ("a", "b")
    world.restart()
    world.server().run()
    assert world.checkpoints.states[-1].times_live == {"a": 4, "b": 4, "c": 2}
