"""A model with sales: exactly the image model without them, and each loss trains its own part."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedshelf.core.errors import ModelError
from fedshelf.core.params import Segment
from fedshelf.core.sales_columns import BASE, FEATURES, HAS, KNOWN, MIX, TARGET, WIDTH
from fedshelf.models.head import head_names, linear_head
from fedshelf.models.initial_weights import load_initial_weights, read_initial_weights
from fedshelf.models.resnet import resnet10
from fedshelf.models.sales import SalesLinear, SalesOutput, add_sales, gate_names, tower_names
from fedshelf.models.trainable import frozen_names
from fedshelf.storage.model_files import save_model
from fedshelf.training.bound_model import BoundModel, TrainingSettings
from fedshelf.training.device import choose
from fedshelf.training.stack_check import find_problem

CLASSES, WIDE = 5, 8


def model(*, is_random: bool = True, forecast_weight: float = 1.0) -> nn.Module:
    """A model with sales; random in all that starts at zero or one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module = resnet10(CLASSES, width=WIDE).eval()
        add_sales(module, forecast_weight=forecast_weight, seed=1)
        if is_random:
            for name in tower_names(module):
                nn.init.normal_(module.get_parameter(name))
    return module


def head(module: nn.Module) -> SalesLinear:
    layer = linear_head(module)[1]
    assert isinstance(layer, SalesLinear)
    return layer


def sales(count: int, *, seed: int = 0) -> Tensor:
    """Figures of photos [count, K, W] at a store that has sales of all products but the last."""
    generator = torch.Generator().manual_seed(seed)
    figures = torch.randn(count, CLASSES, WIDTH, generator=generator)
    figures[..., HAS] = 1.0
    figures[..., TARGET] = torch.randint(0, 9, (count, CLASSES), generator=generator).float()
    figures[..., KNOWN] = 1.0
    mix = figures[..., MIX].clone()
    figures[:, -1] = 0.0
    figures[..., MIX] = mix
    return figures


def inputs(layer: SalesLinear, figures: Tensor, *, seed: int = 5) -> Tensor:
    photos = torch.randn(len(figures), layer.in_features, generator=torch.Generator().manual_seed(seed))
    return torch.cat([photos, figures.flatten(1)], dim=1)


def test_missing_sales_mean_exactly_the_image_model() -> None:
    """Bit for bit: with no figures, and for photos whose figures are all zero, next to photos that have some."""
    layer = head(model())
    figures = sales(6)
    figures[::2] = 0.0
    given = inputs(layer, figures)
    photos = given[:, : layer.in_features].contiguous()
    expected = nn.functional.linear(photos, layer.weight, layer.bias)
    assert torch.equal(layer(photos), expected)
    found = layer(given)
    assert torch.equal(found[::2], expected[::2])
    assert not torch.allclose(found[1::2], expected[1::2])


def test_even_a_tower_that_diverged_leaves_photos_without_sales_alone() -> None:
    layer = head(model())
    nn.init.constant_(layer.tower.w_2, math.nan)
    figures = torch.zeros(2, CLASSES, WIDTH)
    assert layer(inputs(layer, figures)).isfinite().all()


def test_a_product_without_sales_data_gets_the_stores_mix_alone() -> None:
    layer = head(model())
    figures = sales(4)
    given = inputs(layer, figures)
    image = layer(given[:, : layer.in_features])
    added = (layer(given) - image)[:, -1]
    torch.testing.assert_close(added, layer.tower.gate[0] * figures[:, -1, MIX])


def test_the_same_network_sees_each_product() -> None:
    layer = head(model())
    figures = sales(4)
    swapped = figures[:, [1, 0, 2, 3, 4]]
    added, of_swapped = (layer(inputs(layer, each)) - layer(inputs(layer, each * 0)) for each in (figures, swapped))
    torch.testing.assert_close(of_swapped, added[:, [1, 0, 2, 3, 4]])


def test_training_starts_from_the_image_model_with_the_stores_mix_and_from_the_four_week_mean() -> None:
    layer = head(model(is_random=False))
    figures = sales(4)
    given = inputs(layer, figures)
    torch.testing.assert_close(layer(given), layer(given[:, : layer.in_features]) + figures[..., MIX])
    torch.testing.assert_close(layer.forecast(figures), figures[..., BASE].exp() * figures[..., HAS])


def outputs(module: nn.Module, figures: Tensor) -> tuple[SalesOutput, Tensor, Tensor]:
    layer = head(module.train())
    found = layer(inputs(layer, figures))
    assert isinstance(found, SalesOutput)
    return found, layer.weight, layer.tower.w_1


def test_the_cross_entropy_of_photos_trains_the_image_part_alone_and_that_of_sales_the_tower_alone() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    found, weight, tower = outputs(model(), sales(4))
    nn.functional.cross_entropy(found.logits, labels).backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    assert tower.grad is None
    found, weight, tower = outputs(model(forecast_weight=0.0), sales(4))
    found.added_loss(labels).backward()
    assert weight.grad is None
    assert tower.grad is not None
    assert tower.grad.abs().sum() > 0


def test_the_added_loss_is_that_of_sales_alone_and_the_error_of_the_forecast() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    figures = sales(4)
    figures[0] = 0.0  # a photo without sales
    figures[1, :, KNOWN] = 0.0
    found, _, _ = outputs(model(forecast_weight=0.5), figures)
    alone = nn.functional.cross_entropy(found.prior[1:], labels[1:], reduction="sum") / 4
    forecast = head(model()).forecast(figures)
    known = figures[..., KNOWN] * figures[..., HAS] > 0
    error = (forecast - figures[..., TARGET])[known].abs().sum() / figures[..., TARGET][known].sum()
    torch.testing.assert_close(found.added_loss(labels), alone + 0.5 * error)


def test_sales_of_zero_units_leave_the_loss_finite() -> None:
    figures = sales(3)
    figures[..., TARGET] = 0.0
    figures[..., BASE] = 500.0
    found, _, _ = outputs(model(), figures)
    assert found.added_loss(torch.tensor([0, 1, 2])).isfinite()


def test_the_tower_is_no_part_of_the_head_and_the_gate_is_found() -> None:
    module = model()
    assert head_names(module) == {"head.weight", "head.bias"}
    assert gate_names(module) == {"head.tower.gate"}
    assert gate_names(resnet10(CLASSES)) == tower_names(resnet10(CLASSES)) == frozenset()


def test_the_tower_is_trained_with_the_head_or_alone() -> None:
    module = model()
    trained = {name: dict(module.named_parameters()).keys() - frozen_names(module, name, freeze_norm=False)
               for name in ("head", "sales")}  # fmt: skip
    assert trained["sales"] == tower_names(module)
    assert trained["head"] == tower_names(module) | {"head.weight", "head.bias"}


def test_a_model_whose_last_layer_is_a_convolution_is_refused() -> None:
    with pytest.raises(ModelError, match="one linear output layer"):
        add_sales(nn.Sequential(nn.Conv2d(3, 5, 1), nn.Flatten()))


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_an_output_layer_that_computes_something_else_is_refused() -> None:
    with pytest.raises(ModelError, match="is a Doubling"):
        add_sales(nn.Sequential(nn.Flatten(), Doubling(4, 5)))


def test_weights_of_an_image_model_start_a_model_with_sales_and_those_with_sales_continue(tmp_path: Path) -> None:
    names = tuple("abcde")
    image, first, trained = resnet10(CLASSES, width=WIDE), model(is_random=False), model()
    save_model(tmp_path / "image", image.state_dict(), names, {})
    save_model(tmp_path / "sales", trained.state_dict(), names, {})
    load_initial_weights(first, read_initial_weights(tmp_path / "image" / "model.safetensors"), names)
    assert torch.equal(head(first).weight, linear_head(image)[1].weight)
    assert torch.equal(head(first).tower.gate, torch.ones(2))
    load_initial_weights(first, read_initial_weights(tmp_path / "sales" / "model.safetensors"), names)
    assert torch.equal(head(first).tower.w_1, head(trained).tower.w_1)


@pytest.mark.parametrize("train", ["head", "sales"])
def test_clients_trained_in_one_computation_get_the_gradients_of_each_alone(train: str) -> None:
    module = model()
    bound = BoundModel.of(
        module, compute=choose("cpu", threads=1), settings=TrainingSettings(), personal_names=gate_names(module),
        frozen_names=frozen_names(module, train, freeze_norm=False), on_features=True,  # type: ignore[arg-type]
    )  # fmt: skip
    assert bound.takes_sales
    assert bound.num_features == 8 * WIDE + CLASSES * WIDTH
    assert [t.name for t in bound.params.layout.tensors if t.segment is Segment.PERSONAL] == ["head.tower.gate"]
    assert find_problem(bound, 16) is None


def test_there_is_a_figure_for_each_feature_and_five_more() -> None:
    assert len({*range(len(FEATURES)), HAS, MIX, BASE, TARGET, KNOWN}) == WIDTH
