"""A user's own local training."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedshelf
from fedshelf import algorithms
from tests.unit.api.samples import SMALL, same_weights

PLAIN: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.0, "test": "test", **SMALL}


def run(local_training: Any = None, **values: Any) -> fedshelf.Result:
    return fedshelf.Federation("stores", local_training=local_training, **{**PLAIN, **values}).run(2, progress=False)


def sgd(module: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], client_lr: float, hooks: fedshelf.Hooks) -> float:
    """What FedShelf's own loop does without momentum and weight decay, with an optimizer of PyTorch."""
    optimizer = torch.optim.SGD(module.parameters(), lr=client_lr, fused=True)
    loss_sum = count = 0.0
    for photos, labels in batches:
        optimizer.zero_grad()
        loss = hooks.loss(module(photos), labels)
        loss.backward()
        hooks.before_step()
        optimizer.step()
        loss_sum, count = loss_sum + loss.item() * len(labels), count + len(labels)
    return loss_sum / count


@pytest.mark.parametrize(
    "values",
    [
        {}, {"algorithm": algorithms.FedProx(mu=0.5)}, {"algorithm": algorithms.Scaffold()}, {"norm": "group"},
        {"train": "norm"}, {"train": "head", "feature_views": 2}, {"personalize": "fedbn"}, {"loss": "fedlc"},
        {"personalize": "ditto", "compare": False}, {"workers": 2},
    ],
    ids=str,
)  # fmt: skip
def test_the_steps_of_the_built_in_loop_written_by_the_user_give_its_result(values: dict[str, Any]) -> None:
    """Equal up to rounding: PyTorch steps tensor by tensor, FedShelf on one vector."""
    own, built_in = run(sgd, **values), run(**values)
    assert own.model is not None
    assert built_in.model is not None
    for name, value in built_in.model.state_dict().items():
        torch.testing.assert_close(own.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert [r.train_loss for r in own.history] == pytest.approx([r.train_loss for r in built_in.history], abs=1e-4)
    steps = [[client.num_steps for client in round_.clients] for round_ in own.history]
    assert steps == [[client.num_steps for client in round_.clients] for round_ in built_in.history]


def without_hooks(module: nn.Module, batches: Any, client_lr: float, hooks: fedshelf.Hooks) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=client_lr)
    for photos, labels in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(photos), labels)
        loss.backward()
        optimizer.step()
    return loss


def test_training_without_hooks_works_for_algorithms_that_need_none() -> None:
    assert same_weights(run(without_hooks).model, run(without_hooks).model)
    assert not same_weights(run(without_hooks).model, run().model)


def returns_nothing(module: nn.Module, batches: Any, client_lr: float, hooks: fedshelf.Hooks) -> Any:
    return [len(labels) for _, labels in batches]


def fails(module: nn.Module, batches: Any, client_lr: float, hooks: fedshelf.Hooks) -> Any:
    raise KeyError("nope")


def replaces(module: nn.Module, batches: Any, client_lr: float, hooks: fedshelf.Hooks) -> Any:
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return 1.0


def sets_the_mode(module: nn.Module, batches: Any, client_lr: float, hooks: fedshelf.Hooks) -> Any:
    module.train()
    return without_hooks(module, batches, client_lr, hooks)


def diverges(module: nn.Module, batches: Any, client_lr: float, hooks: fedshelf.Hooks) -> Any:
    list(batches)
    return float("nan")


@pytest.mark.parametrize(
    ("training", "values", "said"),
    [
        (returns_nothing, {}, "returns_nothing for local training returns list. It must return the mean training loss"),
        (fails, {}, r"the function fails for local training failed, line \d+: KeyError: 'nope'"),
        (replaces, {}, "replaces tensors of the module. Change their values in place"),
        (sets_the_mode, {"freeze_norm": True}, r"changes frozen values, perhaps by calling module.train\(\)"),
        (without_hooks, {"algorithm": "fedprox"}, r"never calls hooks.before_step\(\)"),
        (without_hooks, {"algorithm": "scaffold"}, r"never calls hooks.before_step\(\)"),
        (sgd, {"personalize": "fedrep"}, "trains parts of the model in turn"),
        (diverges, {}, "the loss is nan"),
    ],
)
def test_training_that_cannot_count_ends_the_run_with_the_reason(
    training: Any, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(fedshelf.FedShelfError, match=said):
        run(training, **values)
