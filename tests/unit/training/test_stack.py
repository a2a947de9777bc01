"""Workbenches that are rows of one matrix, whether that works for a model, and whether it pays."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fedshelf.core.params import Params, bind
from fedshelf.models.resnet import resnet10
from fedshelf.training import loop, stack_check
from fedshelf.training.stack import MOST_ROWS, Stack, default_count
from fedshelf.training.stack_check import Measured, find_problem, measure
from fedshelf.training.timing import noise_runs
from tests.worlds import PLAIN, bound_model, linear, photos, trainer, with_batch_norm


def test_views_of_a_row_are_views_of_that_row() -> None:
    layout = bind(with_batch_norm()).layout
    matrix = torch.arange(3.0 * (layout.size + 5)).reshape(3, -1)
    for row in matrix:
        params = Params(row[: layout.size], layout)
        for spec in layout.tensors:
            view = params.views()[spec.name]
            assert view.sum() == row[spec.offset : spec.offset + spec.size].sum()
            assert view.flatten()[0] == row[spec.offset]


def test_a_seat_is_a_workbench_like_the_one_it_was_made_from() -> None:
    bench = bound_model(with_batch_norm(), replace(PLAIN, momentum=0.9, local_epochs=2))
    start = bench.params.vector.clone()
    expected = trainer(bench=bench)
    expected.fit(round=1, client_lr=0.1)
    for seat in Stack(bound_model(with_batch_norm(), bench.settings), 3).bound_models:
        assert torch.equal(seat.params.vector, start)
        trainer(bench=seat).fit(round=1, client_lr=0.1)
        assert torch.equal(seat.params.vector, bench.params.vector)
        assert trainer(bench=seat).evaluate() == expected.evaluate()


def test_training_on_one_seat_leaves_the_others_and_the_original_alone() -> None:
    bench = bound_model(with_batch_norm())
    stack, start = Stack(bench, 3), bench.params.vector.clone()
    trainer(bench=stack.bound_models[1]).fit(round=1, client_lr=0.1)
    for other in (bench, stack.bound_models[0], stack.bound_models[2]):
        assert torch.equal(other.params.vector, start)
    assert not torch.equal(stack.bound_models[1].params.vector, start)


@pytest.mark.parametrize("rows", [(0, 1, 2, 3), (1, 2), (0, 3), (3, 1, 0)])
def test_any_choice_of_rows_gets_the_gradients_and_statistics_that_each_would_get_alone(rows: tuple[int, ...]) -> None:
    bench = bound_model(with_batch_norm())
    together, alone = Stack(bench, 4), Stack(bench, 4)
    for stack in (together, alone):
        for number, seat in enumerate(stack.bound_models):
            seat.params.vector.mul_(1 + 0.1 * number)
    before = [seat.params.vector.clone() for seat in together.bound_models]
    for stack, differentiate in ((together, together.differentiate), (alone, loop.differentiate_one)):
        local_runs = noise_runs(stack.bound_models, image_size=4, batch_size=5)
        losses = differentiate([local_runs[row] for row in rows])
        assert len(losses) == len(rows)
    for row, (found, expected) in enumerate(zip(together.bound_models, alone.bound_models, strict=True)):
        torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.params.vector, expected.params.vector, rtol=0, atol=1e-6)
        assert torch.equal(found.params.vector, before[row]) == (row not in rows)
        assert bool(found.gradients.any()) == (row in rows)


def test_the_number_of_rows_falls_with_the_size_of_the_model() -> None:
    assert default_count(bound_model()) == MOST_ROWS
    large = bound_model(nn.Sequential(nn.Flatten(), nn.Linear(48, 200_000), nn.Linear(200_000, 3)))
    assert 1 < default_count(large) < MOST_ROWS


class Detached(nn.Module):
    """Its statistics move in a way that vmap does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(48))
        self.head = nn.Linear(48, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        flat = images.flatten(1)
        if self.training and not torch._C._functorch.is_functorch_wrapped_tensor(flat):
            self.seen += flat.mean(0)  # type: ignore[operator]
        logits: torch.Tensor = self.head(flat)
        return logits


def test_statistics_that_do_not_move_together_are_found_out() -> None:
    problem = find_problem(bound_model(Detached()), 4)
    assert problem is not None
    assert "statistics come out wrong" in problem


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_our_own_models_can_be_computed_together_and_trying_changes_nothing(norm: Any) -> None:
    bench = bound_model(resnet10(3, width=8, norm=norm))
    before = {name: tensor.clone() for name, tensor in bench.module.state_dict().items()}
    assert find_problem(bench, 32) is None
    measured = measure(bench, 32, cohort_size=3)
    assert measured.chunk == 3
    assert measured.alone > 0
    assert measured.together is None or measured.together > 0
    for name, tensor in bench.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_one_client_alone_is_not_tried_together() -> None:
    assert measure(bound_model(), 4, cohort_size=1).together is None


def test_a_step_that_keeps_the_processor_busy_is_not_tried_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack_check, "LONG_STEP", 0.0)
    measured = measure(bound_model(), 4, cohort_size=8)
    assert (measured.together, measured.is_faster) == (None, False)
    assert "busy" in measured.reason


def test_together_pays_only_where_it_is_faster_by_a_margin() -> None:
    assert [Measured(alone=1.0, together=seconds, chunk=8).is_faster for seconds in (0.8, 0.95, 1.5)] == [
        True,
        False,
        False,
    ]


def test_photos_that_are_no_batch_of_the_rest_are_trained_in_groups_of_equal_size() -> None:
    """Three clients of 4+4+1, 4+2 and 4+2 photos: together, two together, and alone."""

    stack = Stack(bound_model(), 3)
    sizes: list[list[int]] = []

    def watch(local_runs: Any) -> Any:
        sizes.append([len(local_run.batch.labels) for local_run in local_runs])
        return stack.differentiate(local_runs)

    trainers = [
        trainer(name, bench=seat, train=photos(1, count))
        for name, seat, count in zip("abc", stack.bound_models, (9, 6, 6), strict=True)
    ]
    local_runs = [
        loop.LocalRun(bound=t.bound_model, batches=t._batches(1), round=1, client_lr=0.1, num_examples=len(t.train))
        for t in trainers
    ]
    loop.train(local_runs, watch)
    assert sizes == [[4, 4, 4], [4], [2, 2], [1]]
    assert [local_run.result(0).num_steps for local_run in local_runs] == [3, 2, 2]


def test_the_linear_model_of_these_tests_has_no_problem() -> None:
    assert find_problem(bound_model(linear()), 4) is None
