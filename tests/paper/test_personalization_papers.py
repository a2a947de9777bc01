"""What Collins et al. 2021 and Li et al. 2021 say of FedRep and Ditto, asserted of this implementation."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedshelf.algorithms.fedavg import FedAvg
from fedshelf.core.messages import Broadcast, Purpose, TaskKey
from fedshelf.core.state import ClientState
from fedshelf.personalization.base import PERSONAL, PersonalLayers
from fedshelf.personalization.ditto import Ditto
from fedshelf.personalization.fedper import personal_names
from fedshelf.personalization.fedrep import fedrep
from fedshelf.training.phases import Moves, Phase
from fedshelf.training.settings import TrainingSettings
from fedshelf.training.trainer import Trainer
from tests.paper.quadratics import NUM_VALUES, Quadratic, drifting, trains_on
from tests.worlds import PLAIN, World, bound_model, trainer, with_batch_norm

DECAYING = replace(PLAIN, momentum=0.9, weight_decay=0.1)


def task(params: Tensor, *, round: int = 1, lr: float = 0.1) -> Broadcast:
    key = TaskKey(run_id="r", round=round, attempt=0)
    return Broadcast(key=key, purpose=Purpose.TRAIN, vectors={"params": params}, client_lr=lr)


def head_apart(settings: TrainingSettings = DECAYING) -> Trainer:
    bench = bound_model(with_batch_norm(), settings, PersonalLayers(names=personal_names))
    return trainer(bench=bench)


@pytest.mark.parametrize(("moves", "shared_moves", "personal_moves"), [
    (Moves.PERSONAL, False, True), (Moves.SHARED, True, False), (Moves.ALL, True, True),
])  # fmt: skip
def test_a_phase_moves_its_own_part_and_no_other(moves: Moves, shared_moves: bool, personal_moves: bool) -> None:
    """Not by weight decay or momentum either."""
    at_work = head_apart()
    params = at_work.bound_model.params
    shared, personal = params.trainable.clone(), params.personal.clone()
    replace(at_work, phases=(Phase(moves=moves, epochs=2),)).fit(round=1, client_lr=0.1)
    assert torch.equal(params.trainable, shared) is not shared_moves
    assert torch.equal(params.personal, personal) is not personal_moves


def test_fedrep_trains_the_head_first_and_then_the_representation() -> None:
    whole = replace(DECAYING, batch_size=1000)  # the order of photos is then no matter
    at_work = replace(head_apart(whole), phases=fedrep(3).phases)
    start = at_work.bound_model.params.shared.clone()
    upload, _ = FedAvg().client_round(task(start), ClientState(), at_work)
    by_hand = head_apart(whole)
    by_hand.bound_model.load(start)
    for phase in (Phase(moves=Moves.PERSONAL, epochs=3), Phase(moves=Moves.SHARED)):
        replace(by_hand, phases=(phase,)).fit(round=1, client_lr=0.1)
    num_trainable = by_hand.bound_model.params.layout.num_trainable
    expected = by_hand.bound_model.params.trainable - start[:num_trainable]
    torch.testing.assert_close(by_hand.bound_model.params.personal, at_work.bound_model.params.personal)
    torch.testing.assert_close(upload.delta[:num_trainable], expected, rtol=1e-4, atol=1e-5)
    assert upload.num_steps == 1, "steps of the head alone do not count: they move nothing that travels"


def test_the_hook_of_an_algorithm_sees_no_step_of_the_head_alone() -> None:
    at_work = replace(head_apart(), phases=fedrep(2).phases)
    calls = []
    fit = at_work.fit(round=1, client_lr=0.1, gradient_hook=lambda gradient, values: calls.append(len(gradient)))
    assert calls == [at_work.bound_model.params.layout.num_trainable] * fit.num_steps


def own_model(ditto: Ditto, quadratic: Quadratic, anchor: Tensor, rounds: int) -> Tensor:
    """The store's model after so many rounds in which the global model stays at `anchor`."""
    at_work, state = trains_on(quadratic), ClientState()
    for number in range(1, rounds + 1):
        broadcast = task(anchor, round=number, lr=0.05)
        state = ditto.update_state(broadcast, state, ClientState(), at_work)
    return state.personalization[PERSONAL]


@pytest.mark.parametrize("pull", [0.0, 0.5, 3.0])
def test_ditto_ends_where_its_objective_is_smallest(pull: float) -> None:
    """Of 1/2 · a · (v - b)² + lambda/2 · (v - w)² that is (a · b + lambda · w) / (a + lambda)."""
    quadratic, anchor = drifting()[0], torch.linspace(-2, 2, NUM_VALUES)
    found = own_model(Ditto(pull=pull), quadratic, anchor, rounds=150)
    expected = (quadratic.curvature * quadratic.minimum + pull * anchor) / (quadratic.curvature + pull)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("num_steps", [1, 5])
def test_dittos_model_takes_as_many_steps_at_the_same_rate_as_the_model_that_travels(num_steps: int) -> None:
    """From the first w that the client gets, wherever training has left the bench; each step takes the distance to the
    objective's minimum times 1 - eta · (a + lambda)."""
    quadratic, anchor, pull, rate = drifting()[0], torch.linspace(-2, 2, NUM_VALUES), 0.5, 0.03
    at_work = trains_on(quadratic)
    at_work.bound_model.params.vector.add_(3.0)
    broadcast = replace(task(anchor, lr=rate), num_steps=num_steps)
    found = Ditto(pull=pull).update_state(broadcast, ClientState(), ClientState(), at_work).personalization[PERSONAL]
    target = (quadratic.curvature * quadratic.minimum + pull * anchor) / (quadratic.curvature + pull)
    left = (1 - rate * (quadratic.curvature + pull)) ** num_steps
    torch.testing.assert_close(found, target + left * (anchor - target), rtol=1e-4, atol=1e-5)


def test_dittos_model_sees_photos_in_an_order_of_its_own_that_differs_from_round_to_round() -> None:
    at_work = trainer(bench=bound_model(with_batch_norm()))
    start = at_work.bound_model.params.shared.clone()

    def unheld(number: int) -> Tensor:
        return (
            Ditto(pull=0.0)
            .update_state(task(start, round=number), ClientState(), ClientState(), at_work)
            .personalization[PERSONAL]
        )

    first, again, later = unheld(1), unheld(1), unheld(2)
    travels = start + at_work.upload(task(start)).delta
    assert torch.equal(first, again)
    assert not torch.allclose(first, later)
    assert not torch.allclose(first, travels)


def test_ditto_leaves_what_travels_as_it_is() -> None:
    """The global model is FedAvg's, bit for bit."""
    plain, ditto = World(num_rounds=3), World(num_rounds=3, personalize="ditto")
    plain.run()
    ditto.run()
    assert torch.equal(plain.final, ditto.final)


def test_dittos_model_goes_on_from_where_it_was_and_not_from_the_global_one() -> None:
    quadratic, anchor = drifting()[0], torch.zeros(NUM_VALUES)
    one, two = (own_model(Ditto(pull=0.1), quadratic, anchor, rounds) for rounds in (1, 2))
    target = (quadratic.curvature * quadratic.minimum) / (quadratic.curvature + 0.1)
    assert (two - target).norm() < 0.9 * (one - target).norm() < (anchor - target).norm()
