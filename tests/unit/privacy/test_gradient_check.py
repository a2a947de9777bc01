"""Models whose photos cannot be told apart are found, and named by layer."""

import re

import pytest
import torch
from torch import Tensor, nn

from fedshelf.models.resnet import resnet10
from fedshelf.privacy.gradient_check import TOLERANCE, find_problem
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.device import Compute
from fedshelf.training.settings import TrainingSettings


class MixesPhotos(nn.Module):
    """Subtracts the mean of the batch."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs - inputs.mean(0, keepdim=True)


class DependsOnValues(nn.Module):
    """Branches on a value, for which vmap has no rule."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs if inputs.sum() > 0 else -inputs


def problem_of(module: nn.Module) -> str | None:
    compute = Compute(device=torch.device("cpu"), autocast=False)
    return find_problem(BoundModel.of(module, compute=compute, settings=TrainingSettings()), 16)


def linear(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(3 * 16 * 16, 3))


@pytest.mark.parametrize("module", [resnet10(3, width=8, norm="group"), linear(), linear(nn.GELU())])
def test_a_model_of_usual_layers_has_no_problem(module: nn.Module) -> None:
    before = [parameter.detach().clone() for parameter in module.parameters()]
    assert problem_of(module) is None
    assert all(torch.equal(one, other) for one, other in zip(before, module.parameters(), strict=True))
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())


def test_a_layer_that_mixes_the_photos_of_a_batch_is_found() -> None:
    problem = problem_of(linear(MixesPhotos()))
    assert problem is not None
    assert "a layer mixes the photos of a batch" in problem


def test_a_wrong_gradient_is_told_with_the_tensors_that_are_off() -> None:
    mixing = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Flatten(), MixesPhotos(), nn.Linear(4 * 16 * 16, 3))
    found = re.search(r"off by (\S+), most in '(\S+)': ([^),]+)", str(problem_of(mixing)))
    assert found is not None
    assert found[2] in ("0.weight", "3.weight")
    assert TOLERANCE < float(found[3]) <= 1.05 * float(found[1])


def test_a_layer_without_a_rule_is_named() -> None:
    problem = problem_of(linear(DependsOnValues()))
    assert problem is not None
    assert "in its layer '1'" in problem
    assert "RuntimeError" in problem
