"""Learning rates by depth: the output layer and the rest apart."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedshelf.core.errors import ModelError
from fedshelf.core.rng import Rng
from fedshelf.models.resnet import resnet10
from fedshelf.training.batches import Batch
from fedshelf.training.bound_model import BoundModel, TrainingSettings
from fedshelf.training.device import choose
from fedshelf.training.loop import LocalRun, alone
from fedshelf.training.phases import Moves
from fedshelf.training.trainer import Trainer
from tests.unit.training.test_features import photos

LR, FACTOR = 0.05, 0.2


def module() -> nn.Module:
    torch.manual_seed(3)
    return resnet10(4, width=8, norm="group")


def settings(**values: object) -> TrainingSettings:
    return TrainingSettings(augmentation=None, label_smoothing=0.0, gradient_clip=0.0, **values)  # type: ignore[arg-type]


def noise() -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        yield Batch(torch.randn(6, 3, 16, 16, generator=generator), torch.arange(6) % 4)


def run(given: TrainingSettings, moves: Moves = Moves.ALL) -> BoundModel:
    bound = BoundModel.of(module(), compute=choose("cpu", threads=1), settings=given)
    alone(LocalRun(bound=bound, batches=noise(), round=1, client_lr=LR, num_examples=6, moves=moves))
    return bound


@pytest.mark.parametrize(("backbone", "head"), [(FACTOR, 1.0), (1.0, FACTOR), (FACTOR, 2 * FACTOR)])
def test_each_group_has_its_rate_as_with_parameter_groups_of_torch(backbone: float, head: float) -> None:
    given = settings(backbone_lr_factor=backbone, head_lr_factor=head)
    expected = module()
    expected.train()
    groups = [
        {"params": [p for n, p in expected.named_parameters() if not n.startswith("head.")], "lr": LR * backbone},
        {"params": list(expected.get_submodule("head").parameters()), "lr": LR * head},
    ]
    by_torch = torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=given.weight_decay)
    for batch in noise():
        by_torch.zero_grad()
        functional.cross_entropy(expected(batch.images), batch.labels).backward()
        by_torch.step()
    bound = run(given)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(bound.params.views()[name], parameter.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_of_each_group_is_that_of_a_model_with_one_rate(optimizer: str) -> None:
    def stepped(lr: float, factor: float) -> BoundModel:
        given = settings(optimizer=optimizer, backbone_lr_factor=factor)
        bound = BoundModel.of(module(), compute=choose("cpu", threads=1), settings=given)
        one = LocalRun(bound=bound, batches=iter([next(noise())]), round=1, client_lr=lr, num_examples=6)
        alone(one)
        return bound

    both, fast, slow = stepped(LR, FACTOR), stepped(LR, 1.0), stepped(LR * FACTOR, 1.0)
    head = both.head_range
    assert head is not None
    assert torch.equal(both.params.vector[head], fast.params.vector[head])
    assert torch.equal(both.params.vector[: head.start], slow.params.vector[: head.start])


def test_an_output_layer_of_rate_zero_stays_while_the_rest_moves() -> None:
    before, bound = dict(module().named_parameters()), run(settings(head_lr_factor=0.0, momentum=0.9))
    moved = {name for name, view in bound.params.views().items() if not torch.equal(view, before[name])}
    assert moved == before.keys() - {"head.weight", "head.bias"}


def test_the_output_layer_alone_moves_at_first() -> None:
    before, bound = dict(module().named_parameters()), run(settings(), moves=Moves.HEAD)
    moved = {name for name, view in bound.params.views().items() if not torch.equal(view, before[name])}
    assert moved == {"head.weight", "head.bias"}


@pytest.mark.parametrize(("round", "moves_all"), [(1, False), (2, False), (3, True)])
def test_the_rest_follows_after_some_rounds(round: int, moves_all: bool) -> None:
    bound = BoundModel.of(module(), compute=choose("cpu", threads=1), settings=settings(unfreeze_after=2))
    start = bound.params.vector.clone()
    Trainer(bound_model=bound, client="a", rng=Rng(0), train=photos(8), validation=photos(8)).fit(
        round=round, client_lr=LR
    )
    head = bound.head_range
    assert head is not None
    assert torch.equal(bound.params.vector[: head.start], start[: head.start]) != moves_all
    assert not torch.equal(bound.params.vector[head], start[head])


def test_groups_of_different_rates_are_clipped_apart() -> None:
    given = TrainingSettings(augmentation=None, gradient_clip=1e-3, momentum=0.0, weight_decay=0.0,
                             backbone_lr_factor=0.5)  # fmt: skip
    bound = BoundModel.of(module(), compute=choose("cpu", threads=1), settings=given)
    start, head = bound.params.vector.clone(), bound.head_range
    assert head is not None
    batch = next(noise())
    alone(LocalRun(bound=bound, batches=iter([batch]), round=1, client_lr=1.0, num_examples=6))
    moved = bound.params.vector - start
    assert moved[head].norm().item() == pytest.approx(1e-3, rel=1e-2)
    assert moved[: head.start].norm().item() == pytest.approx(0.5e-3, rel=1e-2)


def test_a_model_without_a_shared_linear_output_layer_cannot_have_two_rates() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    bound = BoundModel.of(plain, compute=choose("cpu", threads=1), settings=settings(backbone_lr_factor=0.5))
    with pytest.raises(ModelError, match="do not share a single linear one"):
        LocalRun(bound=bound, batches=noise(), round=1, client_lr=LR, num_examples=6)
