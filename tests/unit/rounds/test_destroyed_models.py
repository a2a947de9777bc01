"""An upload that destroys the model is found, left out with its client, and no checkpoint of that model is kept."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedshelf.algorithms.fedbuff import FedBuff
from fedshelf.algorithms.fedopt import fedadam
from fedshelf.algorithms.reduce import MEAN
from fedshelf.algorithms.robust import AutoNormBound, bounded
from fedshelf.compression.chain import parse
from fedshelf.compression.codec_policy import CodecPolicy
from fedshelf.core.errors import RunError
from fedshelf.core.events import ClientExcluded, ClientStatus, Participation, RoundVoid, RunStatus
from fedshelf.core.messages import Evaluation, ServerMessage, TaskKey, Upload
from fedshelf.core.rng import Rng
from tests.fakes import Answer
from tests.worlds import World, with_batch_norm

FOUR = ("a", "b", "c", "d")
AUTO = {"aggregator": bounded(MEAN, AutoNormBound())}


def on_upload(change: Callable[[Upload], Answer], *, round: int = 2) -> Callable[[ServerMessage, Answer], Answer]:
    return lambda m, honest: change(honest) if isinstance(honest, Upload) and honest.key.round == round else honest


def scaled(factor: float) -> Callable[[Upload], Answer]:
    return lambda upload: upload.with_vectors(delta=(upload.delta * factor).clamp(-1e30, 1e30))


def with_value(value: float, *, index: int) -> Callable[[Upload], Answer]:
    def change(upload: Upload) -> Answer:
        delta = upload.delta.clone()
        delta[index] = value
        return upload.with_vectors(delta=delta)

    return change


def member(world: World, round: int, name: str) -> Participation:
    (found,) = (m for record in world.finished if record.round == round for m in record.clients if m.client == name)
    return found


def all_saved_models_are_sane(world: World) -> bool:
    return all(bool(state.model.params.abs().max() < 1e3) for state in world.checkpoints.states)


@pytest.mark.parametrize("change", [scaled(1e30), with_value(1e30, index=0), with_value(-1e30, index=-1)])
@pytest.mark.parametrize("names", [("a", "b", "c"), FOUR])
def test_an_upload_that_destroys_the_model_is_left_out_of_the_same_round(
    change: Callable[[Upload], Answer], names: tuple[str, ...]
) -> None:
    """Nobody trains again, and the others' model is what it is without that client."""
    world = World(names=names, num_rounds=4, module=with_batch_norm, tampers={"b": on_upload(change)})
    without = World(names=names, num_rounds=2, module=with_batch_norm)
    without.tampers["b"] = on_upload(lambda upload: replace(upload, num_examples=0))
    assert world.run() is without.run() is RunStatus.FINISHED
    assert not world.sink.of(RoundVoid)
    assert torch.equal(world.checkpoints.states[1].model.params, without.final)
    assert all_saved_models_are_sane(world)
    assert member(world, 2, "b").status is ClientStatus.REFUSED
    assert "the model is destroyed" in member(world, 2, "b").reason
    (excluded,) = world.sink.of(ClientExcluded)
    assert (excluded.client, excluded.last_round) == ("b", 12)
    assert [len(record.clients) for record in world.finished] == [len(names)] * 2 + [len(names) - 1] * 2


def test_of_two_stores_the_one_that_destroys_the_model_is_excluded_and_the_round_is_tried_again() -> None:
    world = World(names=("a", "b"), num_rounds=3, rounds={"quorum": None}, tampers={"b": on_upload(scaled(1e30))})
    assert world.run() is RunStatus.FINISHED
    (void,) = world.sink.of(RoundVoid)
    assert "the model is destroyed" in void.reason
    assert [len(record.clients) for record in world.finished] == [2, 1, 1]
    assert all_saved_models_are_sane(world)


def test_the_server_optimizer_is_rolled_back_too() -> None:
    world = World(algorithm=fedadam(), names=("a", "b", "c"), num_rounds=4, tampers={"c": on_upload(scaled(1e30))})
    assert world.run() is RunStatus.FINISHED
    vectors = [v for state in world.checkpoints.states for v in state.model.optimizer.values()]
    assert vectors
    assert all(bool(vector.isfinite().all()) for vector in vectors)


def test_an_upload_within_bounds_that_ruins_the_loss_rolls_back_the_round_and_its_client() -> None:
    """With compressed downloads, whose differences must not lead over the model that was rolled back."""
    policy = CodecPolicy(codec=parse("int8"), byte_budget=None, rng=Rng(3))
    world = World(names=("a", "b", "c"), num_rounds=5, plan={"downloads": policy}, tampers={"b": on_upload(scaled(50))})
    ruined = TaskKey(run_id="run-1", round=2, attempt=0)
    for name in ("a", "c"):  # as the stores of a deep model would say: this one stands such a step
        world.tampers[name] = lambda message, honest: (
            replace(honest, loss_sum=1e6) if isinstance(honest, Evaluation) and honest.key == ruined else honest
        )
    assert world.run() is RunStatus.FINISHED
    (void,) = world.sink.of(RoundVoid)
    assert "the loss of the median store is" in void.reason
    assert [(e.client, e.last_round) for e in world.sink.of(ClientExcluded)] == [("b", 12)]
    assert [len(record.clients) for record in world.finished] == [3, 2, 2, 2, 2]
    assert all(m.status is ClientStatus.COUNTED for record in world.finished for m in record.clients)


def test_one_store_cannot_undo_a_round_by_claiming_that_its_loss_is_huge() -> None:
    world = World(names=("a", "b", "c"), num_rounds=3)
    world.tampers["b"] = lambda m, honest: replace(honest, loss_sum=1e12) if isinstance(honest, Evaluation) else honest
    assert world.run() is RunStatus.FINISHED
    assert not world.sink.of(RoundVoid)


def test_a_model_that_all_stores_destroy_together_ends_the_run_with_advice() -> None:
    world = World(names=("a", "b", "c"), num_rounds=3)
    world.tampers |= dict.fromkeys("abc", on_upload(scaled(1e30), round=1))
    with pytest.raises(RunError, match=r"void 10 times in a row\. .*the model is destroyed.*--client-lr, --server-lr"):
        world.run()
    assert not world.checkpoints.states


@pytest.mark.parametrize("factor", [1e6, -1e6])
def test_from_four_uploads_on_one_counts_with_at_most_five_times_the_median_norm(factor: float) -> None:
    honest = World(names=FOUR, num_rounds=2, plan=AUTO)
    world = World(names=FOUR, num_rounds=2, plan=AUTO, tampers={"d": on_upload(scaled(factor))})
    assert world.run() is honest.run() is RunStatus.FINISHED
    assert not any(m.reason for record in honest.finished for m in record.clients)
    found = member(world, 2, "d")
    assert found.status is ClientStatus.COUNTED
    assert found.reason.startswith("norm bounded: trainable from")
    step, usual = (
        (run.checkpoints.states[1].model.params - run.checkpoints.states[0].model.params).norm()
        for run in (world, honest)
    )
    assert step < 5 * usual
    assert not world.sink.of(ClientExcluded)


def test_without_attackers_the_automatic_bound_changes_not_one_bit() -> None:
    plain, bound = World(names=FOUR, module=with_batch_norm), World(names=FOUR, module=with_batch_norm, plan=AUTO)
    assert plain.run() is bound.run() is RunStatus.FINISHED
    assert torch.equal(plain.final, bound.final)


def test_a_claim_of_many_photos_weighs_ten_times_the_median() -> None:
    def claims(count: int) -> Callable[[ServerMessage, Answer], Answer]:
        return lambda m, honest: replace(honest, num_examples=count) if isinstance(honest, Upload) else honest

    def run(claim: int) -> World:
        world = World(names=("a", "b", "c"), num_rounds=1, rounds={"max_examples": 100_000})
        world.tampers = {"a": claims(8), "b": claims(10), "c": claims(claim)}
        assert world.run() is RunStatus.FINISHED
        return world

    greedy = run(10**12)
    assert torch.equal(greedy.final, run(100).final)
    found = member(greedy, 1, "c")
    assert found.num_examples == 100
    assert found.reason == "it claims 100,000 photos and weighs as 100, 10 times the median"
    assert not any(m.reason for record in run(99).finished for m in record.clients)


def asynchronous(tamper: Any) -> World:
    return World(
        names=FOUR, num_rounds=6, algorithm=FedBuff(server_lr=1.0, buffer_size=3), module=with_batch_norm,
        delays={"a": 1.0, "b": 1.3, "c": 2.9, "d": 0.7}, tampers={"d": tamper},
    )  # fmt: skip


@pytest.mark.parametrize("change", [scaled(1e30), with_value(-1e30, index=-1)])
def test_in_asynchronous_rounds_its_client_is_excluded_and_the_buffer_fills_without_it(
    change: Callable[[Upload], Answer],
) -> None:
    world = asynchronous(on_upload(change))
    assert world.run() is RunStatus.FINISHED
    assert all_saved_models_are_sane(world)
    (excluded,) = world.sink.of(ClientExcluded)
    assert (excluded.client, excluded.last_round) == ("d", 12)
    refused = [m for record in world.finished for m in record.clients if m.status is ClientStatus.REFUSED]
    assert {m.client for m in refused} == {"d"}
    assert "the model is destroyed" in refused[0].reason
    assert all(sum(m.status is ClientStatus.COUNTED for m in r.clients) == 3 for r in world.finished)


def test_in_asynchronous_rounds_a_claim_weighs_ten_times_the_median_too() -> None:
    world = asynchronous(lambda m, h: replace(h, num_examples=10**12) if isinstance(h, Upload) else h)
    assert world.run() is RunStatus.FINISHED
    claims = [m.num_examples or 0 for record in world.finished for m in record.clients if m.client == "d"]
    assert claims
    assert max(claims) <= 10 * 10
