"""Distillation: the loss by hand, the same view for teacher and student, and the same training in any engine."""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedshelf.core.rng import Rng
from fedshelf.data.augmentation import Augmentation
from fedshelf.data.photo_set import PhotoSet
from fedshelf.models.settings import Normalization
from fedshelf.privacy.dp_sgd import sum_clipped
from fedshelf.training import loop
from fedshelf.training.batches import Batch, batches
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.distillation import Distillation, Teacher, distilled
from fedshelf.training.loop import LocalRun
from fedshelf.training.settings import TrainingSettings
from fedshelf.training.stack import Stack
from tests.worlds import PLAIN, bound_model, linear, photos, trainer

AUGMENTED = replace(PLAIN, augmentation=Augmentation())


def learning(settings: TrainingSettings, weight: float, temperature: float = 1.0) -> TrainingSettings:
    return replace(settings, distillation=Distillation(weight=weight, temperature=temperature))


def teacher_like(bound: BoundModel) -> Teacher:
    """A teacher with the student's own weights."""
    return Teacher(module=copy.deepcopy(bound.module), image_size=4, normalization=bound.normalization)


def other_teacher(rows: Tensor | None = None) -> Teacher:
    module = linear()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(-3)
    return Teacher(module=module, image_size=4, normalization=Normalization(), rows=rows)


def test_the_loss_is_that_of_the_paper_computed_by_hand() -> None:
    logits, teacher = torch.tensor([[0.0, 2 * math.log(3)]]), torch.zeros(1, 2)
    label_loss = -math.log(0.9)  # the second class, of softmax(0, ln 9)
    divergence = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)  # at T = 2: q = (1/2, 1/2), p = (1/4, 3/4)
    found = distilled(torch.tensor(label_loss), logits, teacher, Distillation(weight=0.7, temperature=2.0))
    assert found.item() == pytest.approx(0.3 * label_loss + 0.7 * 4 * divergence, rel=1e-6)


def test_at_a_high_temperature_the_gradient_is_the_difference_of_logits_over_the_number_of_classes() -> None:
    logits = torch.tensor([[1.0, -2.0, 1.0], [0.5, 0.0, -0.5]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-1.0, -1.0, 2.0], [3.0, -2.0, -1.0]], dtype=torch.float64)  # all of mean zero
    distilled(torch.zeros(()), logits, teacher, Distillation(weight=1.0, temperature=1e3)).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, (logits - teacher).detach() / (3 * 2), rtol=1e-2, atol=1e-4)


def test_a_student_that_says_what_its_teacher_says_of_the_same_view_has_no_gradient() -> None:
    bound = bound_model(linear(), learning(AUGMENTED, 1.0))
    work = replace(trainer(bench=bound), teacher=teacher_like(bound))
    assert work.gradient(round=1).abs().max() < 1e-6
    bound = bound_model(linear(), learning(PLAIN, 1.0))
    asked = replace(trainer(bench=bound), teacher=other_teacher())
    assert asked.gradient(round=1).abs().max() > 1e-3


def test_the_students_own_views_are_those_without_a_teacher() -> None:
    bound = bound_model(linear(), learning(AUGMENTED, 0.5))
    given = photos(3, 9)

    def made(teacher: Teacher | None) -> Iterator[Batch]:
        return batches(bound, given, Rng(0), round=1, client="a", epochs=2, teacher=teacher)

    plain, asked = list(made(None)), list(made(other_teacher()))
    assert all(torch.equal(one.images, other.images) for one, other in zip(plain, asked, strict=True))
    assert all(batch.teacher_logits is None for batch in plain)
    assert all(batch.teacher_logits is not None for batch in asked)


class Small(nn.Module):
    """A "teacher" that returns what it sees, averaged down to 4 pixels a side."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images_BCHW, 4).flatten(1)


def test_a_teacher_of_another_size_sees_the_students_view_at_its_own_size() -> None:
    smooth = nn.functional.interpolate(
        torch.rand(6, 3, 3, 3, generator=torch.Generator().manual_seed(1)) * 255, size=(64, 64), mode="bilinear"
    )
    large = smooth.permute(0, 2, 3, 1).round().to(torch.uint8)
    small = nn.functional.avg_pool2d(smooth, 4).permute(0, 2, 3, 1).round().to(torch.uint8)
    given = PhotoSet(small.numpy(), np.zeros(6, np.int64), teacher_images=large.numpy())
    bound = bound_model(linear(), learning(replace(AUGMENTED, batch_size=6), 0.5))
    teacher = Teacher(module=Small(), image_size=64, normalization=bound.normalization)
    first, second = batches(bound, given, Rng(0), round=1, client="a", epochs=2, teacher=teacher)

    def difference(student: Batch, asked: Batch) -> float:
        assert asked.teacher_logits is not None
        return float((Small()(student.images) - asked.teacher_logits).abs().mean())

    assert difference(first, first) < 0.05 < 0.3 < difference(first, second)


def test_a_teachers_outputs_are_in_the_order_of_the_students_classes() -> None:
    views = torch.randn(2, 3, 4, 4)
    in_order, swapped = other_teacher(), other_teacher(torch.tensor([2, 0, 1]))
    assert torch.equal(swapped.logits(views), in_order.logits(views)[:, [2, 0, 1]])


def test_many_stores_in_one_computation_learn_from_the_teacher_as_each_alone() -> None:
    settings, given, ends = learning(AUGMENTED, 0.8, 2.0), [photos(5, 8), photos(6, 8)], []

    def local_runs(models: list[BoundModel]) -> list[LocalRun]:
        return [
            LocalRun(
                bound=model, round=1, client_lr=0.1, num_examples=8,
                batches=batches(model, one, Rng(0), round=1, client="a", epochs=2, teacher=other_teacher()),
            )
            for model, one in zip(models, given, strict=True)
        ]  # fmt: skip

    alone = [bound_model(linear(), settings) for _ in given]
    for local_run in local_runs(alone):
        loop.alone(local_run)
        ends.append(local_run.bound.params.shared.clone())
    stack = Stack(bound_model(linear(), settings), 2)
    for model in stack.bound_models:
        model.load(bound_model(linear()).params.shared)
    stack.train(local_runs(list(stack.bound_models)))
    for model, end in zip(stack.bound_models, ends, strict=True):
        torch.testing.assert_close(model.params.shared, end, rtol=1e-4, atol=1e-5)


def test_the_gradients_of_single_photos_have_the_teachers_part_too() -> None:
    settings = learning(replace(PLAIN, batch_size=8), 0.8, 2.0)
    sums = []
    for differentiate in (lambda run: sum_clipped(run, 1e9, "flat"), lambda run: loop.differentiate_one([run])):
        bound = bound_model(linear(), settings)
        made = batches(bound, photos(5, 8), Rng(0), round=1, client="a", epochs=1, teacher=other_teacher())
        local_run = LocalRun(bound=bound, batches=made, round=1, client_lr=0.1, num_examples=8)
        assert local_run.draw()
        differentiate(local_run)
        sums.append(bound.gradients.clone())
    torch.testing.assert_close(sums[0] / 8, sums[1], rtol=1e-4, atol=1e-6)


def test_a_teacher_needs_memory_for_its_values_twice_and_for_its_largest_layer_once_a_photo() -> None:
    """3 x 4 x 4 pixels into a convolution of 5 channels with padding: 48 and 80 values; then 80 into 2."""
    layers = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(), nn.Linear(80, 2))
    teacher = Teacher(module=layers, image_size=4, normalization=Normalization())
    num_values = 3 * 5 * 9 + 5 + 80 * 2 + 2
    flattened = 80 + 80
    assert teacher.bytes_needed(10) == 2 * 4 * num_values + 10 * 4 * max(48 + 80, flattened)
