"""Which layers of a model make its outputs."""

import pytest
from torch import nn

from fedshelf.models.build import build
from fedshelf.models.head import head_layers, head_names
from fedshelf.models.settings import ModelSettings


def test_the_last_linear_layer_is_the_head() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3), nn.Softmax(1))
    assert head_layers(module) == {"2": module[2]}
    assert head_names(module) == {"2.weight", "2.bias"}
    assert head_names(nn.Linear(4, 3, bias=False)) == {"weight"}
    assert head_names(nn.Conv2d(3, 3, 1)) == frozenset()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet10", {"head"}),
        ("resnet18", {"fc"}),
        ("dla46_c", {"fc"}),  # a convolution
        ("pit_ti_distilled_224", {"head", "head_dist"}),  # the mean of two
    ],
)
def test_the_head_is_exactly_what_another_number_of_classes_changes(name: str, expected: set[str]) -> None:
    size = 224 if "224" in name else 32
    few, many = (
        build(ModelSettings(name=name, num_classes=n, image_size=size), seed=0).state_dict() for n in (5, 1009)
    )
    module = build(ModelSettings(name=name, num_classes=5, image_size=size), seed=0)
    assert set(head_layers(module)) == expected
    assert head_names(module) == {tensor for tensor in few if few[tensor].shape != many[tensor].shape}
