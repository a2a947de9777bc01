"""Losses of a client's own, in the training loop: what its counts make of them, alone and together with others."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedshelf.algorithms.registry import ALGORITHMS
from fedshelf.app.components import algorithm_of
from fedshelf.config.schema import RunConfig
from fedshelf.core.messages import Broadcast, Purpose, TaskKey, auxiliary_vectors
from fedshelf.core.state import ClientState, ModelState
from fedshelf.data.photo_set import PhotoSet
from fedshelf.training import loop
from fedshelf.training.batches import gather
from fedshelf.training.bound_model import BoundModel, TrainingSettings
from fedshelf.training.cross_entropy import calibration_of, cross_entropy, stacked
from fedshelf.training.losses import FedLC, FedRS, Loss
from fedshelf.training.stack import Stack
from fedshelf.training.trainer import Trainer
from tests.worlds import PLAIN, bound_model, linear, photos, trainer, with_batch_norm

CPU = torch.device("cpu")
LOSSES: tuple[Loss, ...] = (FedRS(), FedLC())
SMOOTH = replace(PLAIN, label_smoothing=0.1)


def of_classes(labels: list[int], seed: int = 1) -> PhotoSet:
    """Photos with these labels."""
    drawn = photos(seed, len(labels))
    return PhotoSet(drawn.images, np.array(labels, dtype=np.int64))


def client(loss: Loss | None, labels: list[int], *, settings: TrainingSettings = PLAIN, **values: Any) -> Trainer:
    bench: BoundModel = values.pop("bench", None) or bound_model(linear(), replace(settings, loss=loss, **values))
    return replace(trainer(bench=bench), train=of_classes(labels))


def head(work: Trainer) -> Tensor:
    """The classifier's weights and biases, a row a class: [K, D + 1]."""
    weight, bias = list(work.bound_model.module.parameters())[-2:]
    return torch.cat([weight, bias.unsqueeze(1)], dim=1).detach().clone()


def moved(work: Trainer) -> Tensor:
    """How far training moved each class' row: [K]."""
    before = head(work)
    work.fit(round=1, client_lr=0.1)
    distances: Tensor = (head(work) - before).norm(dim=1)
    return distances


def test_plain_cross_entropy_has_no_calibration_and_need_not_know_the_classes() -> None:
    assert calibration_of(PLAIN.loss, np.array([0]), None, CPU) is None
    assert stacked([None, None]) is None


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_plain_cross_entropy_is_torchs_to_the_last_bit(smoothing: float) -> None:
    logits_BK, labels_B = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 1])
    found = cross_entropy(logits_BK, labels_B, None, label_smoothing=smoothing)
    assert torch.equal(found, F.cross_entropy(logits_BK, labels_B, label_smoothing=smoothing))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_that_depends_on_the_stock_asks_for_the_number_of_classes(loss: Loss) -> None:
    with pytest.raises(ValueError, match=type(loss).__name__):
        calibration_of(loss, np.array([0]), None, CPU)


def test_a_client_counts_the_photos_it_trains_on_of_all_classes_of_the_catalogue() -> None:
    expected: list[tuple[Loss, list[float], list[float]]] = [
        (FedLC(2.0), [-2 * 2**-0.25, -math.inf, -math.inf], [1, 1, 1]), (FedRS(0.25), [0, 0, 0], [1, 0.25, 0.25]),
    ]  # fmt: skip
    for loss, shift, scale in expected:
        found = client(loss, [0, 0]).calibration
        assert found is not None
        assert found.shift.tolist() == pytest.approx(shift)
        assert found.scale.tolist() == scale


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_step_is_the_step_of_the_calibrated_logits(smoothing: float) -> None:
    """Full batch, by hand: classes 0 and 2 in stock, 3 and 1 photos."""
    labels = torch.tensor([0, 2, 0, 0])
    for loss in LOSSES:
        work = client(loss, labels.tolist(), label_smoothing=smoothing, batch_size=100)
        module = linear()
        images_BHWC, _ = gather(work.train, np.arange(4))
        mean, std = work.bound_model.normalization.mean, work.bound_model.normalization.std
        x = (images_BHWC.float() / 255 - torch.tensor(mean)) / torch.tensor(std)
        logits = module(x.permute(0, 3, 1, 2))
        if isinstance(loss, FedRS):
            expected = F.cross_entropy(logits * torch.tensor([1, 0.5, 1]), labels, label_smoothing=smoothing)
        else:
            few = logits[:, [0, 2]] - torch.tensor([3**-0.25, 1.0])
            expected = F.cross_entropy(few, labels // 2, label_smoothing=smoothing)
        expected.backward()
        by_hand = torch.cat([(p - 0.1 * p.grad).detach().flatten() for p in module.parameters() if p.grad is not None])
        fit = work.fit(round=1, client_lr=0.1)
        torch.testing.assert_close(work.bound_model.params.trainable, by_hand, rtol=1e-5, atol=1e-6)
        assert fit.loss == pytest.approx(expected.item(), rel=1e-5), "what is reported is what is trained with"


def test_absent_classes_are_pushed_down_by_cross_entropy_less_by_fedrs_and_not_at_all_by_fedlc() -> None:
    labels, settings = [0, 0, 2, 2, 0], replace(SMOOTH, momentum=0.9, gradient_clip=5.0, local_epochs=3)
    plain, restricted, calibrated = (moved(client(loss, labels, settings=settings)) for loss in (None, *LOSSES))
    assert plain[1] > 1.3 * restricted[1] > 0
    assert calibrated[1] == 0
    assert calibrated[[0, 2]].min() > 0


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "ridge"])  # which has no loss
def test_every_algorithm_trains_with_the_loss(name: str) -> None:
    algorithm = algorithm_of(RunConfig(algorithm=name))
    work = client(FedLC(), [0, 2, 2, 0, 0])
    state = ModelState(params=work.bound_model.params.shared.clone())
    num_trainable = work.bound_model.params.layout.num_trainable
    message = Broadcast(
        key=TaskKey(run_id="r", round=1, attempt=0),
        purpose=Purpose.TRAIN,
        vectors={"params": state.params, **auxiliary_vectors(algorithm.broadcast(state, num_trainable))},
        client_lr=0.1,
    )
    before = head(work)
    algorithm.client_round(message, ClientState(), work)
    rows = (head(work) - before).norm(dim=1)
    assert rows[1] == 0
    assert rows[[0, 2]].min() > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_over_all_photos_is_that_of_the_clients_loss(loss: Loss) -> None:
    """SCAFFOLD's option 1 asks for it."""
    labels = [0, 2, 2, 0, 0]
    whole = client(loss, labels, batch_size=100)
    start = whole.bound_model.params.trainable.clone()
    whole.fit(round=1, client_lr=1.0)
    gradient = client(loss, labels, batch_size=2).gradient(round=1)
    torch.testing.assert_close(gradient, start - whole.bound_model.params.trainable, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "labels", [[1], [2, 2, 2, 2, 2], [0, 0, 0, 0, 1]], ids=["a photo", "a class", "a batch of one"]
)
def test_one_class_or_a_batch_of_one_class_is_trained_on(loss: Loss, labels: list[int]) -> None:
    work = client(loss, labels, settings=replace(SMOOTH, gradient_clip=5.0, momentum=0.9, local_epochs=2))
    fit = work.fit(round=1, client_lr=0.1)
    assert math.isfinite(fit.loss)
    assert work.bound_model.params.vector.isfinite().all()
    assert fit.num_steps == 2 * math.ceil(len(labels) / 4)


@pytest.mark.parametrize("loss", LOSSES)
def test_evaluation_is_plain_cross_entropy_over_all_classes(loss: Loss) -> None:
    scores = [client(name, [0, 0]).evaluate() for name in (loss, None)]
    assert scores[0] == scores[1]


STOCKS = ([0, 1, 0, 0, 2], [2, 2, 2], [1, 0, 1, 1, 1, 0, 1])


@pytest.mark.parametrize("model", [linear, with_batch_norm])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss", LOSSES)
def test_clients_together_train_with_the_loss_that_each_has_alone(loss: Loss, smoothing: float, model: Any) -> None:
    settings = replace(PLAIN, loss=loss, label_smoothing=smoothing, momentum=0.9, local_epochs=2)
    stack = Stack(bound_model(model(), settings), len(STOCKS))
    together = [client(loss, labels, bench=seat) for labels, seat in zip(STOCKS, stack.bound_models, strict=True)]
    local_runs = [
        loop.LocalRun(bound=work.bound_model, batches=work._batches(1), round=1, client_lr=0.01,
                  num_examples=len(work.train), calibration=work.calibration)
        for work in together
    ]  # fmt: skip
    stack.train(local_runs)
    plain = client(None, STOCKS[2], bench=bound_model(model(), replace(settings, loss=None)))
    plain.fit(round=1, client_lr=0.01)
    for work, local_run, labels in zip(together, local_runs, STOCKS, strict=True):
        alone = client(loss, labels, bench=bound_model(model(), settings))
        fit = alone.fit(round=1, client_lr=0.01)
        torch.testing.assert_close(work.bound_model.params.vector, alone.bound_model.params.vector, rtol=0, atol=1e-6)
        assert local_run.result(0).loss == pytest.approx(fit.loss, abs=1e-6)
    assert not torch.allclose(together[2].bound_model.params.vector, plain.bound_model.params.vector, atol=1e-3)


def test_a_client_that_diverges_says_so_with_a_loss_of_its_own_too() -> None:
    work = client(FedLC(), [0, 2, 2, 0, 0])
    work.bound_model.params.vector.fill_(math.inf)
    with pytest.raises(Exception, match="diverged in round 1"):
        work.fit(round=1, client_lr=0.1)
