"""Figures of stores under masks: the sum alone is known, and whatever goes wrong with it, the round's model stays."""

import base64
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedshelf.algorithms.ridge import Ridge
from fedshelf.core.errors import RefusedError
from fedshelf.core.events import ClientStatus, RoundVoid, RunStatus
from fedshelf.core.messages import (
    Broadcast,
    CandidateScore,
    Evaluation,
    Failure,
    MaskedPurpose,
    MaskingRequest,
    ProductCount,
    Purpose,
    ServerMessage,
    TaskKey,
)
from fedshelf.privacy.policy_tables import Metrics
from fedshelf.privacy.withholding import withhold
from fedshelf.rounds.sums.evaluations import STEP, EvaluationCodes, SummedEvaluation
from fedshelf.training.trainer import evaluate
from tests.examples import examples
from tests.fakes import Answer
from tests.property.rounds.test_crashes import Killed, fragile
from tests.property.rounds.test_masked_crashes import NAMES, world_of
from tests.worlds import World, linear, photos

KEY = TaskKey(run_id="run-1", round=1, attempt=0)
STAGES = ("keys", "shares", "evaluate", "survivors", "unmasking")


def stage_of(message: ServerMessage) -> str:
    """The stage of an evaluation's exchange that a message is of; "" for none."""
    if isinstance(message, MaskingRequest):
        return message.stage.value if message.purpose is MaskedPurpose.EVALUATE else ""
    return "evaluate" if isinstance(message, Broadcast) and message.purpose is Purpose.EVALUATE else ""


def failing(stage: str) -> Any:
    def tamper(message: ServerMessage, answer: Answer) -> Answer:
        return Failure(key=message.key, reason="out of memory") if stage_of(message) == stage else answer  # type: ignore[union-attr]

    return tamper


def figures(world: World, names: Iterable[str]) -> tuple[int, int]:
    """Right answers and photos of the final model, counted here."""
    correct, total = 0, 0
    for name in names:
        trainer = world.trainer(name)
        trainer.bound_model.load(world.final)
        score = evaluate(trainer.bound_model, trainer.validation)
        correct, total = correct + score.num_correct, total + score.num_examples
    return correct, total


def assert_sets_are_alike(world: World) -> None:
    """Sums of evaluations of one round that any client has helped to open are over the same stores, three or more."""
    opened = defaultdict(set)
    for record in world.opened_sums.values():
        for one in record.found:
            if one.is_evaluation:
                opened[one.key.run_id, one.key.round].add(one.members)
    assert all(len(sets) == 1 for sets in opened.values())
    assert all(len(members) >= 3 for sets in opened.values() for members in sets)


@pytest.fixture(scope="module")
def plain() -> World:
    world = world_of(masked=False, num_rounds=1)
    world.run()
    return world


def test_the_figures_of_a_round_are_those_of_all_stores_together(plain: World) -> None:
    world = world_of(num_rounds=1)
    world.run()
    [record], [other] = world.finished, plain.finished
    correct, total = figures(world, NAMES)
    assert record.accuracy == other.accuracy == correct / total
    assert record.report == other.report
    assert record.report is not None
    assert (record.report.num_stores, record.report.num_photos) == (len(NAMES), total)
    assert sum(product.correct for product in record.report.products) == correct
    assert {member.accuracy for member in record.clients} == {None}
    assert_sets_are_alike(world)


@pytest.mark.parametrize("stage", STAGES)
def test_a_store_that_is_gone_in_any_stage_is_left_out_of_the_figures_not_of_the_model(
    plain: World, stage: str
) -> None:
    world = world_of(num_rounds=1)
    world.tampers = {"b": failing(stage)}
    assert world.run() is RunStatus.FINISHED
    [record] = world.finished
    assert torch.equal(world.final, plain.final)
    assert [member.status for member in record.clients] == [ClientStatus.COUNTED] * len(NAMES)
    in_sum = NAMES if stage in ("survivors", "unmasking") else ("a", "c", "d")
    correct, total = figures(world, in_sum)
    assert record.accuracy == correct / total
    assert_sets_are_alike(world)


@pytest.mark.parametrize("stage", STAGES)
def test_with_too_few_stores_in_any_stage_the_round_has_no_figures_and_its_model(plain: World, stage: str) -> None:
    world = world_of(num_rounds=1)
    world.tampers = {"a": failing(stage), "b": failing(stage)}
    assert world.run() is RunStatus.FINISHED
    [record] = world.finished
    assert torch.equal(world.final, plain.final)
    assert (record.accuracy, record.best_round) == (None, 1)
    assert record.train_loss is not None
    assert record.report is not None
    assert record.report.products == ()
    assert world.sink.of(RoundVoid) == []
    opened = [one for store in world.opened_sums.values() for one in store.found if one.is_evaluation]
    assert bool(opened) is (stage == "unmasking"), "no store reveals a share before"


def test_a_store_without_validation_photos_adds_nothing(plain: World) -> None:
    kept = {name: (plain.trainer(name).train, plain.trainer(name).validation) for name in NAMES}
    data = {**kept, "c": (kept["c"][0], photos(1, 0))}
    world = world_of(num_rounds=1, data=data)
    world.run()
    [record] = world.finished
    correct, total = figures(world, ("a", "b", "d"))
    assert record.accuracy == correct / total
    assert record.report is not None
    assert (record.report.num_stores, record.report.num_withheld) == (3, 0)


def test_a_store_that_counts_no_products_is_counted_as_one() -> None:
    world, twin = (world_of(num_rounds=1, masked=masked, withholding=("b",)) for masked in (True, False))
    for each in (world, twin):
        each.run()
    [record], [other] = world.finished, twin.finished
    assert record.report == other.report
    assert record.report is not None
    assert (record.report.num_stores, record.report.num_withheld) == (3, 1)


@pytest.mark.parametrize("masked", [True, False])
def test_what_a_policy_withholds_is_in_no_sum(masked: bool) -> None:
    world = world_of(num_rounds=1, masked=masked)
    for client in world.clients.values():
        client._withhold = partial(withhold, metrics=Metrics(losses=False, per_product=False))
    world.run()
    [record] = world.finished
    assert (record.train_loss, record.accuracy is None) == (None, False)
    assert record.report is not None
    assert (record.report.products, record.report.num_withheld) == ((), len(NAMES))


def masked_as(codes: bytes) -> Any:
    def tamper(message: ServerMessage, answer: Answer) -> Answer:
        if not isinstance(answer, Evaluation):
            return answer
        return replace(answer, masked=base64.b64encode(codes).decode())

    return tamper


@pytest.mark.parametrize("codes", [b"", bytes(8), bytes(8 * 1000)], ids=len)
def test_masked_figures_of_another_size_are_not_added(codes: bytes) -> None:
    world = world_of(num_rounds=1)
    world.tampers = {"b": masked_as(codes)}
    world.run()
    correct, total = figures(world, ("a", "c", "d"))
    assert world.finished[0].accuracy == correct / total


def test_figures_that_contradict_each_other_are_not_used(plain: World) -> None:
    """A store that adds anything makes the sum anything: what is impossible is seen."""
    size = EvaluationCodes(summands=64, num_products=3, depth=1).size
    world = world_of(num_rounds=1)
    world.tampers = {"b": masked_as(bytes(range(8)) * size)}
    world.run()
    assert torch.equal(world.final, plain.final)
    assert world.finished[0].accuracy is None


def test_a_store_sends_no_figures_without_masks_whatever_the_server_asks() -> None:
    world = world_of(num_rounds=1)
    sent: list[Evaluation] = []

    def watch(message: ServerMessage, answer: Answer) -> Answer:
        if isinstance(answer, Evaluation):
            sent.append(answer)
        return answer

    world.tampers["a"] = watch
    world.run()
    [figures] = sent
    assert replace(figures, masked="") == Evaluation(key=figures.key, num_examples=0, num_correct=0, loss_sum=None)
    broadcast = Broadcast(key=figures.key, purpose=Purpose.EVALUATE, client_lr=0.0, vectors={"params": world.final})
    for task in (broadcast, replace(broadcast, key=replace(figures.key, attempt=7), masking="[]")):
        assert isinstance(world._handle("a", task), Failure)


@pytest.mark.parametrize("restart_clients", [False, True])
def test_a_server_that_is_killed_between_training_and_the_end_of_an_evaluation(restart_clients: bool) -> None:
    """The restarted one has the same model, and the figures of the same stores, or none."""
    complete = world_of(num_rounds=2)
    complete.run()
    wanted = [record.accuracy for record in complete.finished]
    accuracies = set()
    for number in range(1, 4 * len(STAGES) + 1):
        world, seen = world_of(num_rounds=2), {"messages": 0}
        switch = fragile(world)

        def killing(message: ServerMessage, answer: Answer, seen: dict[str, int] = seen, at: int = number) -> Answer:
            if stage_of(message) and not seen.get("killed"):
                seen["messages"] += 1
                if seen["messages"] == at:
                    seen["killed"] = 1
                    raise Killed
            return answer

        world.tampers = dict.fromkeys(NAMES, killing)
        with pytest.raises(Killed):
            world.run()
        for name in world.names if restart_clients else ():
            world.restart_client(name)
        world.restart()
        assert world.server().run() is RunStatus.FINISHED
        assert switch.step
        assert torch.equal(world.final, complete.final), number
        found = [record.accuracy for record in world.finished]
        assert found[0] in (wanted[0], None)
        assert found[1] == wanted[1], "the next round has figures again"
        accuracies.add(found[0])
        assert_sets_are_alike(world)
    assert wanted[0] in accuracies
    if not restart_clients:
        assert accuracies == {wanted[0]}, "stores that still know the exchange repeat it"


def ridge_world(*, masked: bool = True, **values: Any) -> World:
    return world_of(masked=masked, num_rounds=1, algorithm=Ridge(), module=linear, **values)


def test_a_head_in_closed_form_is_chosen_by_the_scores_of_all_stores_together() -> None:
    world, twin = ridge_world(), ridge_world(masked=False)
    for each in (world, twin):
        each.run()
    assert torch.equal(world.final, twin.final)
    assert [r.accuracy for r in world.finished] == [r.accuracy for r in twin.finished] != [None]
    purposes = {one.purpose for store in world.opened_sums.values() for one in store.found}
    assert purposes == {MaskedPurpose.TRAIN, MaskedPurpose.CHOOSE, MaskedPurpose.EVALUATE}
    assert torch.equal(*(each.checkpoints.states[-1].model.optimizer["chosen"] for each in (world, twin)))


def test_without_enough_scores_the_head_is_that_of_the_default_lambda() -> None:
    def failing(message: ServerMessage, answer: Answer) -> Answer:
        is_choice = isinstance(message, MaskingRequest) and message.purpose is MaskedPurpose.CHOOSE
        return Failure(key=message.key, reason="out of memory") if is_choice else answer  # type: ignore[union-attr]

    world = ridge_world()
    world.tampers = dict.fromkeys(("a", "b"), failing)
    assert world.run() is RunStatus.FINISHED
    assert world.checkpoints.states[-1].model.optimizer["chosen"].tolist() == [1e-2, 1.0]
    assert world.finished[0].accuracy is not None


@pytest.mark.parametrize("stage", ["shares", "unmasking"])
def test_sums_of_a_void_round_are_rolled_back_and_sent_whole_again(stage: str) -> None:
    """A store's state is that of its newest counted upload: a difference to what does not count would be lost."""
    clean = ridge_world()
    clean.run()
    world, left = ridge_world(), {"a": 1, "b": 1}

    def failing_once(name: str) -> Any:
        def tamper(message: ServerMessage, answer: Answer) -> Answer:
            is_it = isinstance(message, MaskingRequest) and message.purpose is MaskedPurpose.TRAIN
            if is_it and message.stage.value == stage and left[name]:  # type: ignore[union-attr]
                left[name] = 0
                return Failure(key=message.key, reason="out of memory")  # type: ignore[union-attr]
            return answer

        return tamper

    world.tampers = {name: failing_once(name) for name in left}
    assert world.run() is RunStatus.FINISHED
    assert len(world.sink.of(RoundVoid)) == 1
    assert torch.equal(world.final, clean.final)
    assert set(world.checkpoints.states[-1].counted.values()) == {replace(KEY, attempt=1)}


def test_a_store_that_drops_out_after_masking_keeps_no_part_in_the_head() -> None:
    """What it had sent does not count, so its next upload is whole again, and no difference."""
    world = ridge_world()
    three = ridge_world(names=("a", "c", "d"))
    three.run()

    def late(message: ServerMessage, answer: Answer) -> Answer:
        is_training = isinstance(message, Broadcast) and message.purpose is Purpose.TRAIN
        return Failure(key=message.key, reason="out of memory") if is_training else answer  # type: ignore[union-attr]

    world.tampers = {"b": late}
    assert world.run() is RunStatus.FINISHED
    assert torch.equal(world.final, three.final)
    assert set(world.checkpoints.states[-1].counted) == {"a", "c", "d"}


def test_a_store_masks_no_change_of_its_sums_whatever_the_server_asks() -> None:
    world = ridge_world()
    world.run()
    task = Broadcast(
        key=replace(KEY, round=2), purpose=Purpose.TRAIN, client_lr=0.1, vectors={"params": world.final}, counted=KEY,
        masking="{}",
    )  # fmt: skip
    answer = world._handle("a", task)
    assert isinstance(answer, Failure)
    assert "sums over photos are masked once" in answer.reason


COUNTS = st.integers(0, 40)


@st.composite
def evaluations(draw: Any) -> Evaluation:
    """What a store may answer, with or without losses, scores and products."""
    totals = draw(st.lists(COUNTS, min_size=3, max_size=3))
    rights = [draw(st.integers(0, total)) for total in totals]
    examples, correct = sum(totals), sum(rights)
    losses = st.floats(0, 1e30)
    scores = tuple(
        CandidateScore(num_correct=draw(st.integers(0, examples)), losses=tuple(draw(losses) for _ in range(2)))
        for _ in range(4)
    )
    products = tuple(
        ProductCount(index=index, correct=right, total=total)
        for index, (right, total) in enumerate(zip(rights, totals, strict=True))
        if total
    )
    told = draw(st.booleans())
    return Evaluation(
        key=KEY, num_examples=examples, num_correct=correct, loss_sum=draw(st.none() | losses),
        candidates=scores if draw(st.booleans()) else (), products=products if told else (),
        levels=(draw(st.integers(correct, examples)), correct) if told and products else (),
    )  # fmt: skip


@given(st.lists(evaluations(), min_size=1, max_size=9))
@settings(max_examples=examples(60), deadline=None)
def test_sums_of_integers_are_the_sums_of_the_figures(found: list[Evaluation]) -> None:
    codes = EvaluationCodes(summands=9, num_scores=4 * 3, num_products=3, depth=2)
    most = codes.most * STEP
    total = codes.summed(found, num_losses=2)
    with_loss = [one for one in found if one.loss_sum is not None]
    photos = sum(one.num_examples for one in with_loss)
    assert total.num_examples == sum(one.num_examples for one in found)
    assert total.num_correct == sum(one.num_correct for one in found)
    assert (total.loss is None) is (photos == 0)
    if total.loss is not None:
        losses = sum(min(one.loss_sum or 0.0, most) for one in with_loss)
        assert total.loss == pytest.approx(losses / photos, rel=1e-12, abs=len(found) * STEP)
    scored = [one for one in found if one.candidates]
    assert total.num_scored == sum(one.num_examples for one in scored)
    for index, score in enumerate(total.candidates):
        assert score.num_correct == sum(one.candidates[index].num_correct for one in scored)
    reporting = [one for one in found if one.products]
    assert total.num_reporting == len(reporting)
    assert total.num_withholding == sum(bool(one.num_examples) and not one.products for one in found)
    for product in total.products:
        mine = [each for one in reporting for each in one.products if each.index == product.index]
        assert (product.correct, product.total) == (sum(m.correct for m in mine), sum(m.total for m in mine))
    assert total.levels == tuple(sum(one.levels[level] for one in reporting) for level in range(2))


def test_figures_that_were_not_asked_for_are_refused() -> None:
    codes = EvaluationCodes(summands=4, num_products=2, depth=1)
    of_one = Evaluation(key=KEY, num_examples=1, num_correct=1, loss_sum=0.5)
    with pytest.raises(RefusedError, match="counts product 2 of 2"):
        codes.encode(replace(of_one, products=(ProductCount(index=2, correct=1, total=1),)))
    with pytest.raises(RefusedError, match="11 figures, and 9 are asked for"):
        replace(codes, num_products=1, num_scores=0).encode(replace(of_one, levels=(1, 1, 1)))
    with pytest.raises(RefusedError, match="no room for scores"):
        EvaluationCodes.scoring(4, 5)


def test_the_mean_of_no_photo_is_unknown_not_zero() -> None:
    codes = EvaluationCodes(summands=4)
    assert codes.decode(np.zeros(4, "<u8")) == SummedEvaluation(num_examples=0, num_correct=0, loss=None)
    assert SummedEvaluation(num_examples=0, num_correct=0, loss=None).accuracy is None
