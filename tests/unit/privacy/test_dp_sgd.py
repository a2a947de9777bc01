"""A step of DP-SGD: every photo's gradient is bounded before the sum, and the sum is noised."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from opacus import GradSampleModule
from torch import Tensor, nn

from fedshelf.core.rng import Rng
from fedshelf.data.photo_set import PhotoSet
from fedshelf.models.resnet import resnet10
from fedshelf.privacy import dp_sgd
from fedshelf.privacy.dp_sgd import (
    Clipping,
    PrivateTraining,
    SampleDP,
    num_steps,
    poisson,
    sampling_rate,
    sum_clipped,
)
from fedshelf.training.batches import Amount, Batch
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.device import Compute
from fedshelf.training.loop import LocalRun
from fedshelf.training.phases import Moves
from fedshelf.training.settings import TrainingSettings
from fedshelf.training.trainer import Trainer

SIZE, CLASSES, PHOTOS = 16, 5, 6
KEY = bytes(32)
MakeModule: TypeAlias = Callable[[], nn.Module]
MODELS: dict[str, MakeModule] = {
    "resnet10 with group norm": lambda: resnet10(CLASSES, width=8, norm="group"),
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(),
        nn.Linear(288, CLASSES),
    ),
    "layer norm": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, CLASSES)
    ),
    "one linear layer": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, CLASSES)),
}  # fmt: skip


@pytest.fixture(params=MODELS, ids=[name.replace(" ", "-") for name in MODELS])
def make_module(request: pytest.FixtureRequest) -> MakeModule:
    return MODELS[request.param]


def bound_of(module: nn.Module, **settings: Any) -> BoundModel:
    compute = Compute(device=torch.device("cpu"), autocast=False)
    return BoundModel.of(
        module, compute=compute, settings=TrainingSettings(batch_size=PHOTOS, label_smoothing=0.0, **settings)
    )


def batch_of(count: int = PHOTOS, scale: float = 1.0) -> Batch:
    generator = torch.Generator().manual_seed(3)
    images = scale * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return Batch(images.contiguous(memory_format=torch.channels_last), torch.arange(count) % CLASSES)


def local_run_of(bound: BoundModel, batch: Batch | None, **values: Any) -> LocalRun:
    local_run = LocalRun(bound=bound, batches=iter(()), round=1, client_lr=0.1, num_examples=PHOTOS, **values)
    local_run.batch = batch
    return local_run


def seeded(make: MakeModule, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def photo_gradients(module: nn.Module, batch: Batch) -> list[Tensor]:
    """The gradient of each photo by plain autograd, tensors in the order of the module [B, …]."""
    found = []
    for image, label in zip(batch.images, batch.labels, strict=True):
        loss = nn.functional.cross_entropy(module(image[None]), label[None])
        found.append(torch.autograd.grad(loss, list(module.parameters())))
    return [torch.stack(each) for each in zip(*found, strict=True)]


def summed(
    bound: BoundModel, batch: Batch, clip_norm: float, clipping: Clipping = "flat", **values: Any
) -> list[Tensor]:  # fmt: skip
    """The sum of clipped gradients, tensors in the order of the module."""
    sum_clipped(local_run_of(bound, batch, **values), clip_norm, clipping)
    return [parameter.grad.clone() for parameter in bound.module.parameters() if parameter.grad is not None]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_gradients_equal_those_of_opacus(make_module: MakeModule) -> None:
    batch, module = batch_of(), seeded(make_module)
    for layer in module.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # Opacus' hooks do not allow it
    reference = GradSampleModule(module, loss_reduction="sum")
    images = batch.images.contiguous()  # Opacus 1.6 computes wrong gradients of convolutions from channels_last
    nn.functional.cross_entropy(reference(images), batch.labels, reduction="sum").backward()
    samples = [parameter.grad_sample for parameter in reference.parameters()]
    norms = torch.stack([sample.flatten(1).norm(dim=1) for sample in samples]).norm(dim=0)
    clip_norm = float(norms.median())
    factors = (clip_norm / norms).clamp(max=1.0)
    assert (factors < 1).any()
    assert (factors == 1).any()
    for own, sample in zip(summed(bound_of(seeded(make_module)), batch, clip_norm), samples, strict=True):
        assert torch.allclose(own, torch.tensordot(factors, sample, dims=1), atol=1e-5)


@pytest.mark.parametrize("clipping", ["flat", "layer", "automatic"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0])
def test_the_influence_of_a_photo_is_at_most_the_clip_norm(
    make_module: MakeModule, clipping: Clipping, scale: float
) -> None:
    bound = bound_of(seeded(make_module))
    norm = torch.cat([gradient.flatten() for gradient in summed(bound, batch_of(1, scale), 0.7, clipping)]).norm()
    assert 0 < norm <= 0.7 * (1 + 1e-5)


def test_layers_are_bounded_one_by_one() -> None:
    make = MODELS["convolutions"]
    gradients = summed(bound_of(seeded(make)), batch_of(1, 100.0), 0.3, "layer")
    for weight, bias in zip(gradients[::2], gradients[1::2], strict=True):
        assert math.hypot(weight.norm(), bias.norm()) == pytest.approx(0.3 / math.sqrt(3), rel=1e-4)


def test_automatic_clipping_scales_every_photo_to_about_the_norm() -> None:
    make = MODELS["one linear layer"]
    expected = photo_gradients(seeded(make), batch_of())
    norms = torch.stack([each.flatten(1).norm(dim=1) for each in expected]).norm(dim=0)
    for own, each in zip(summed(bound_of(seeded(make)), batch_of(), 2.0, "automatic"), expected, strict=True):
        assert torch.allclose(own, torch.tensordot(2.0 / (norms + 0.01), each, dims=1), atol=1e-5)


def test_chunks_of_photos_give_the_same_sum(make_module: MakeModule, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = summed(bound_of(seeded(make_module)), batch_of(), 0.5)
    bound = bound_of(seeded(make_module))
    monkeypatch.setattr(dp_sgd, "MEMORY", 4 * 2 * bound.params.layout.num_changing)
    for one, other in zip(whole, summed(bound, batch_of(), 0.5), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_photo_without_a_finite_gradient_counts_as_none(bad: float) -> None:
    make = MODELS["convolutions"]
    batch = batch_of()
    without = summed(bound_of(seeded(make)), Batch(batch.images[1:], batch.labels[1:]), 0.5)
    batch.images[0] = bad
    for one, other in zip(without, summed(bound_of(seeded(make)), batch, 0.5), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_only_the_moved_values_get_gradient_and_noise() -> None:
    bound = bound_of(seeded(MODELS["convolutions"]))
    local_run = local_run_of(bound, batch_of(), moves=Moves.HEAD)
    training = PrivateTraining(noise_multiplier=2.0, clip_norm=0.5)
    local_run.batches = iter([batch_of()])
    training(local_run)
    head = bound.head_range
    assert head is not None
    assert bound.gradients[head].count_nonzero() == head.stop - head.start
    assert not bound.gradients[: head.start].any()


def steps_of(training: PrivateTraining, batch: Batch, **settings: Any) -> Tensor:
    """The gradient after each of a hundred steps."""
    bound, seen = bound_of(seeded(MODELS["one linear layer"]), **settings), list[Tensor]()
    local_run = local_run_of(
        bound, None, gradient_hook=lambda gradient, values: seen.append(gradient.clone())
    )  # fmt: skip
    local_run.batches = iter([batch] * 100)
    training(local_run)
    return torch.stack(seen)


def test_noise_has_the_declared_deviation() -> None:
    empty = Batch(torch.empty(0), torch.empty(0, dtype=torch.int64))
    training = PrivateTraining(noise_multiplier=3.0, clip_norm=0.2)
    noise = steps_of(training, empty, gradient_clip=0.0)
    assert noise.std() == pytest.approx(3.0 * 0.2 / PHOTOS, rel=0.02)
    assert noise.mean() == pytest.approx(0, abs=0.001)
    assert abs(torch.corrcoef(noise)[0, 1]) < 0.1  # fresh at each step


def test_noise_is_new_at_each_training() -> None:
    training = PrivateTraining(noise_multiplier=1.0, clip_norm=1.0)
    empty = Batch(torch.empty(0), torch.empty(0, dtype=torch.int64))
    assert not torch.equal(steps_of(training, empty), steps_of(training, empty))


def test_the_denominator_does_not_depend_on_the_batch() -> None:
    training = PrivateTraining(noise_multiplier=1e-9, clip_norm=1e-3, key=KEY)
    few = batch_of(2)
    gradient = steps_of(training, few, gradient_clip=0.0, momentum=0.0)[0]
    expected = torch.cat([each.flatten() for each in summed(bound_of(seeded(MODELS["one linear layer"])), few, 1e-3)])
    assert torch.allclose(gradient, expected / PHOTOS, atol=1e-8)


def test_photos_are_drawn_independently_and_secretly() -> None:
    amount = Amount(num_photos=50, batch_size=10, epochs=400)
    draws = [list(poisson(amount, torch.Generator().manual_seed(0))) for _ in range(2)]
    sizes = torch.tensor([float(len(chosen)) for chosen in draws[0]])
    assert len(sizes) == 400 * 5
    assert sizes.mean() == pytest.approx(10, rel=0.03)
    assert sizes.var() == pytest.approx(50 * 0.2 * 0.8, rel=0.15)  # binomial
    assert any(list(one) != list(other) for one, other in zip(*draws, strict=True))


def test_a_step_may_draw_no_photo_or_all() -> None:
    assert any(not len(chosen) for chosen in poisson(Amount(3, 1, 100), torch.Generator()))
    assert all(len(chosen) == 3 for chosen in poisson(Amount(3, 8, 5), torch.Generator()))


def test_rate_and_steps_follow_from_the_batch_size() -> None:
    assert sampling_rate(50, 10) == 0.2
    assert sampling_rate(5, 10) == 1.0
    assert num_steps(55, 10, 3) == 18
    assert num_steps(55, 10, 3, given=7) == 7


def test_an_infinite_loss_of_some_photos_stops_nothing_and_shows_nowhere() -> None:
    """A run that stops because of it would tell that such photos are there, without noise."""
    bound = bound_of(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, CLASSES)))
    bound.params.views()["1.bias"].copy_(torch.tensor([0.0, 3e38, 0.0, 0.0, 0.0]))
    local_run = LocalRun(bound=bound, batches=iter([batch_of()]), round=1, client_lr=0.1, num_examples=PHOTOS)
    seconds = PrivateTraining(noise_multiplier=1.0, clip_norm=1.0)(local_run)
    assert local_run.result(seconds).loss == 0


def test_random_views_follow_neither_from_the_seed_nor_from_one_another() -> None:
    """From a known seed, a photo more in a batch would change the views of all photos after it."""
    drawn: list[Tensor] = []

    def note(local_run: LocalRun) -> float:
        drawn.append(next(local_run.batches).images)
        return 0.0

    def everything(amount: Amount, generator: torch.Generator) -> Iterator[NDArray[np.int64]]:
        yield np.arange(amount.num_photos)

    compute = Compute(device=torch.device("cpu"), autocast=False)
    bound = BoundModel.of(MODELS["one linear layer"](), compute=compute, settings=TrainingSettings())
    images = np.random.default_rng(0).integers(0, 256, (PHOTOS, SIZE, SIZE, 3), dtype=np.uint8)
    photos = PhotoSet(images, np.arange(PHOTOS) % CLASSES)
    plain = Trainer(bound_model=bound, client="a", rng=Rng(0), train=photos, validation=photos, run=note)
    for trainer in (plain, plain, *[replace(plain, draw=everything, is_private=True)] * 2):
        trainer.fit(round=1, client_lr=0.1)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[2], drawn[3])


@pytest.mark.parametrize("clip_norm", [1e-44, 1e-7, 1e7, 1e38])
def test_clip_norms_that_float32_cannot_cover_with_noise_are_refused(clip_norm: float) -> None:
    assert "noise in float32 covers norms from" in SampleDP(noise_multiplier=1.0, clip_norm=clip_norm).problems()[0]
    assert not SampleDP(noise_multiplier=1.0, clip_norm=1e-3).problems()
