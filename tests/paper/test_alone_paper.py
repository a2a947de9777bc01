"""Local only is a federation of one store; fine-tuning is training on from the last global model."""

import math
from dataclasses import replace

import pytest
import torch

from fedshelf.algorithms.fedavg import FedAvg
from fedshelf.algorithms.ridge import Ridge
from fedshelf.core.messages import Broadcast, Purpose, TaskKey
from fedshelf.core.state import ClientState
from fedshelf.data.augmentation import Augmentation
from fedshelf.personalization.alone import ClosedForm, train_alone
from fedshelf.personalization.base import PERSONAL
from fedshelf.personalization.finetune import FineTuning
from fedshelf.training.losses import FedLC
from fedshelf.training.settings import TrainingSettings
from fedshelf.training.trainer import Trainer
from tests.paper.quadratics import NUM_VALUES, drifting, trains_on
from tests.worlds import CLASSES, PLAIN, World, bound_model, photos, trainer, with_batch_norm

USUAL = TrainingSettings(batch_size=4, local_epochs=2)  # momentum, weight decay, clipping, augmentation
ROUNDS = 4


def rate(number: int) -> float:
    return 0.1 / number


def log_prior(store: Trainer) -> torch.Tensor:
    """log(K · p_k(c)) for each class c, by hand."""
    counts = [float((store.train.labels == label).sum()) for label in range(len(CLASSES))]
    shares = [(count + 0.5) / (sum(counts) + len(CLASSES) / 2) for count in counts]
    return torch.tensor([math.log(len(CLASSES) * share) for share in shares])


def last(params: torch.Tensor, *, round: int = ROUNDS) -> Broadcast:
    key = TaskKey(run_id="run-1", round=round, attempt=1)
    return Broadcast(key=key, purpose=Purpose.COMPARE, vectors={"params": params}, client_lr=0.0)


@pytest.mark.parametrize("method", ["none", "fedbn", "fedper"])
def test_a_store_alone_comes_to_the_model_of_a_federation_of_that_one_store(method: str) -> None:
    """To the last bit: the same training, the same draws, the same arithmetic at the server."""
    world = World(
        names=("a",), num_rounds=ROUNDS, module=with_batch_norm, training=USUAL, personalize=method,
        plan={"client_lr": rate},
    )  # fmt: skip
    world.run()
    bench = bound_model(with_batch_norm(), USUAL, world.personalization)
    store = trainer("a", bench=bench)
    first = bench.params.shared.clone()
    bench.params.vector.add_(1.0)  # wherever it was before
    train_alone(store, first, run_id="run-1", num_rounds=ROUNDS, client_lr=rate)
    assert torch.equal(bench.params.shared, world.final)
    assert not torch.equal(bench.params.shared, first)
    own = world.states["a"].peek(TaskKey(run_id="run-1", round=ROUNDS, attempt=0)).personalization
    assert torch.equal(bench.params.personal, own.get(PERSONAL, torch.zeros(0)))


@pytest.mark.parametrize(("at_first", "at_last"), [(True, True), (True, False), (False, True)])
def test_where_the_run_solves_for_the_output_layer_a_store_alone_does_so_too(at_first: bool, at_last: bool) -> None:
    """As a federation of that one store, whose photos are all for training."""
    own, none = photos(1, 24), photos(2, 0)
    world = World(
        names=("a",), num_rounds=2, data={"a": (own, none)},
        plan={"closed_form": Ridge(), "warm_start": at_first, "refit_head": at_last},
    )  # fmt: skip
    world.run()
    bench = bound_model()
    store = replace(trainer("a", bench=bench), train=own, validation=none)
    solve = Ridge().for_model(bench.params.layout, bench.output_layer).solve_alone
    closed_form = ClosedForm(solve=solve, at_first=at_first, at_last=at_last, trains=True)
    train_alone(
        store,
        bench.params.shared.clone(),
        run_id="run-1",
        num_rounds=2,
        client_lr=lambda number: 0.1,
        closed_form=closed_form,
    )
    torch.testing.assert_close(bench.params.shared, world.final)


def test_a_store_alone_trains_its_whole_model_whatever_the_phases_of_the_rounds() -> None:
    world = World(module=with_batch_norm, personalize="fedrep", names=("a",))
    bench = bound_model(with_batch_norm(), PLAIN, world.personalization)
    first = bench.params.shared.clone()
    in_phases = replace(trainer("a", bench=bench), phases=world.personalization.phases)
    train_alone(in_phases, first, run_id="r", num_rounds=2, client_lr=rate)
    found = bench.params.vector.clone()
    train_alone(trainer("a", bench=bench), first, run_id="r", num_rounds=2, client_lr=rate)
    assert torch.equal(found, bench.params.vector)


def test_a_store_alone_reaches_its_own_optimum_and_not_the_common_one() -> None:
    quadratic, other = drifting()
    store = trains_on(quadratic)
    train_alone(store, torch.zeros(NUM_VALUES), run_id="r", num_rounds=200, client_lr=lambda number: 0.1)
    found = store.bound_model.params.trainable
    torch.testing.assert_close(found, quadratic.minimum, rtol=1e-4, atol=1e-4)
    assert (found - other.minimum).norm() > 1


def test_fine_tuning_is_so_many_epochs_at_its_own_rate_from_the_last_global_model() -> None:
    """On a quadratic each of its steps takes the distance to the store's minimum times 1 - eta · a; it begins where the
    store's mix of products is in the bias, and ends in the mean over epochs."""
    quadratic = drifting()[0]
    store = trains_on(quadratic)
    steps_per_epoch = -(-len(store.train) // PLAIN.batch_size)
    start = torch.linspace(-1, 1, NUM_VALUES)
    store.bound_model.load(start)
    FineTuning(epochs=3, client_lr=0.01).finalize(last(start), store)
    start[-len(CLASSES) :] += log_prior(store)
    epoch = (1 - 0.01 * quadratic.curvature) ** steps_per_epoch
    left = (epoch + epoch**2 + epoch**3) / 3
    expected = quadratic.minimum + left * (start - quadratic.minimum)
    torch.testing.assert_close(store.bound_model.params.trainable, expected, rtol=1e-4, atol=1e-5)


def test_fine_tuning_leaves_the_rounds_as_they_are() -> None:
    plain, tuned = World(num_rounds=3), World(num_rounds=3, personalize="finetune")
    plain.run()
    tuned.run()
    assert torch.equal(plain.final, tuned.final)
    key = TaskKey(run_id="run-1", round=3, attempt=0)
    assert all(not state.peek(key).personalization for state in tuned.states.values())


def test_fine_tuning_draws_its_own_order_and_the_same_one_again() -> None:
    results = []
    for round_ in (ROUNDS, ROUNDS, ROUNDS + 1):
        bench = bound_model(with_batch_norm(), USUAL)
        store, start = trainer("a", bench=bench), bench.params.shared.clone()
        FineTuning(epochs=2, client_lr=0.05).finalize(last(start, round=round_), store)
        results.append(bench.params.shared.clone())
    bench = bound_model(with_batch_norm(), replace(USUAL, local_epochs=2))
    again = Broadcast(
        key=TaskKey(run_id="r", round=ROUNDS, attempt=0),
        purpose=Purpose.TRAIN,
        vectors={"params": bench.params.shared.clone()},
        client_lr=0.05,
    )
    FedAvg().client_round(again, ClientState(), trainer("a", bench=bench))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[0], bench.params.shared), "not the last round's order over again"


def tuned_and_then_trained(settings: TrainingSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """What fine-tuning leaves, and what training as in the rounds makes of it: the bench's own settings are as they
    were."""
    bench = bound_model(with_batch_norm(), settings)
    store = trainer("a", bench=bench)
    FineTuning(epochs=2, client_lr=0.05).finalize(last(bench.params.shared.clone()), store)
    tuned = bench.params.shared.clone()
    store.fit(round=1, client_lr=0.05)
    return tuned, bench.params.shared.clone()


def test_fine_tuning_takes_labels_as_they_are() -> None:
    (tuned, trained), (same, other) = (
        tuned_and_then_trained(replace(USUAL, label_smoothing=smoothing)) for smoothing in (0.0, 0.3)
    )
    assert torch.equal(tuned, same)
    assert not torch.equal(trained, other)


def test_fine_tuning_sees_photos_as_they_are_or_mirrored() -> None:
    mirrored = Augmentation(crop_scale=(1.0, 1.0), rotation_degrees=0.0, brightness=0.0, contrast=0.0)
    views = (Augmentation(), mirrored, Augmentation(flip=False), None)
    found = [tuned_and_then_trained(replace(USUAL, augmentation=augmentation)) for augmentation in views]
    tuned, trained = zip(*found, strict=True)
    assert torch.equal(tuned[0], tuned[1])
    torch.testing.assert_close(tuned[2], tuned[3], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tuned[0], tuned[2], rtol=1e-3)
    assert not torch.equal(trained[0], trained[1])


def test_without_an_epoch_of_fine_tuning_the_model_only_expects_what_the_store_stocks() -> None:
    bench = bound_model(with_batch_norm(), USUAL)
    store, start = trainer("a", bench=bench), bench.params.shared.clone()
    FineTuning(epochs=0, client_lr=0.05).finalize(last(start), store)
    moved = bench.params.shared - start
    (bias,) = (each for each in bench.params.layout.tensors if each.name == "4.bias")
    found = moved[bias.offset : bias.offset + bias.size]
    torch.testing.assert_close(found, log_prior(store), rtol=1e-5, atol=1e-6)
    assert int((moved != 0).sum()) == len(CLASSES)


def test_what_a_store_trains_by_itself_it_trains_by_plain_cross_entropy_whatever_the_rounds_do() -> None:
    """FedLC's loss takes no account of how often a product is there, which is what a store's own model has to know."""
    results = []
    for settings in (USUAL, replace(USUAL, loss=FedLC())):
        bench = bound_model(with_batch_norm(), settings)
        store, start = trainer("a", bench=bench), bench.params.shared.clone()
        FineTuning(epochs=2, client_lr=0.05).finalize(last(start), store)
        results.append(bench.params.shared.clone())
        train_alone(store, start, run_id="r", num_rounds=2, client_lr=rate)
        results.append(bench.params.shared.clone())
        store.fit(round=1, client_lr=0.05)  # as in the rounds
        results.append(bench.params.shared.clone())
    assert torch.equal(results[0], results[3])
    assert torch.equal(results[1], results[4])
    assert not torch.equal(results[2], results[5])
