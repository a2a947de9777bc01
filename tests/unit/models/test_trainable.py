"""What is trained of a model, and what stays frozen."""

import pytest
import torch
from torch import nn

from fedshelf.core.choices import TrainName
from fedshelf.core.errors import ModelError
from fedshelf.core.params import Segment
from fedshelf.models.resnet import resnet10
from fedshelf.models.timm_models import import_timm
from fedshelf.models.trainable import frozen_names
from fedshelf.training.batches import Batch
from fedshelf.training.bound_model import BoundModel, TrainingSettings
from fedshelf.training.device import choose
from fedshelf.training.loop import LocalRun, alone


def bound_model(train: TrainName = "all", *, freeze_norm: bool = False, module: nn.Module | None = None) -> BoundModel:
    module = module or resnet10(5, width=8)
    return BoundModel.of(
        module, compute=choose("cpu", threads=1), settings=TrainingSettings(augmentation=None),
        frozen_names=frozen_names(module, train, freeze_norm=freeze_norm), on_features=train == "head",
    )  # fmt: skip


def step(bound: BoundModel) -> None:
    """Take two steps of training on noise."""
    generator = torch.Generator().manual_seed(1)
    shape = (6, 3, 32, 32) if bound.num_features is None else (6, bound.num_features)
    noise = [Batch(torch.randn(*shape, generator=generator), torch.arange(6) % 5) for _ in range(2)]
    alone(LocalRun(bound=bound, batches=iter(noise), round=1, client_lr=0.1, num_examples=6))


def test_the_output_layer_alone() -> None:
    module = resnet10(5)
    trained = dict(module.named_parameters()).keys() - frozen_names(module, "head", freeze_norm=False)
    assert trained == {"head.weight", "head.bias"}


@pytest.mark.parametrize("freeze_norm", [False, True])
def test_normalization_layers_and_the_output_layer(freeze_norm: bool) -> None:
    module = resnet10(5)
    frozen = frozen_names(module, "norm", freeze_norm=freeze_norm)
    assert not any(name.startswith("head.") for name in frozen)
    for name, child in module.named_modules():
        is_norm = isinstance(child, nn.BatchNorm2d)
        assert {f"{name}.{key}" in frozen for key, _ in child.named_parameters(recurse=False)} <= {
            not (is_norm or name == "head")
        }
        if is_norm:
            assert (f"{name}.running_mean" in frozen) == (f"{name}.running_var" in frozen) == freeze_norm


def test_layers_of_a_transformer_are_found_by_type() -> None:
    vit = import_timm().create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, depth=1)
    trained = dict(vit.named_parameters()).keys() - frozen_names(vit, "norm", freeze_norm=False)
    assert trained == {
        *(f"blocks.0.norm{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
        "norm.weight", "norm.bias", "head.weight", "head.bias",
    }  # fmt: skip


@pytest.mark.parametrize(("train", "freeze_norm"), [("all", True), ("head", False), ("norm", True), ("norm", False)])
def test_frozen_values_keep_their_bits_in_training_and_others_move(train: TrainName, freeze_norm: bool) -> None:
    bound = bound_model(train, freeze_norm=freeze_norm)
    frozen = bound.params.frozen.clone()
    before = {name: view.clone() for name, view in bound.params.views(frozen=False).items()}
    step(bound)
    assert len(frozen)
    assert torch.equal(bound.params.frozen, frozen)
    assert not any(torch.equal(view, before[name]) for name, view in bound.params.views(frozen=False).items())
    counters = [buffer for name, buffer in bound.module.named_buffers() if name.endswith("num_batches_tracked")]
    assert all(int(counter) == (0 if freeze_norm or train == "head" else 2) for counter in counters)


def test_frozen_statistics_normalize_in_training_as_in_evaluation() -> None:
    bound = bound_model("all", freeze_norm=True)
    assert not bound.has_batch_norm, "it can train on one photo"
    photo = torch.randn(1, 3, 32, 32)
    bound.module.eval()
    expected = bound.logits(photo)
    bound.train()
    assert torch.equal(bound.logits(photo), expected)


def test_the_layout_says_what_is_frozen_and_its_digest_does_too() -> None:
    plain, head, frozen = bound_model(), bound_model("head"), bound_model("all", freeze_norm=True)
    digests = {bound.params.layout.digest for bound in (plain, head, frozen)}
    assert len(digests) == 3
    layout = head.params.layout
    assert layout.num_trainable == layout.num_shared == layout.num_changing == 5 * 64 + 5
    assert layout.size == plain.params.layout.size
    assert [t.segment for t in layout.tensors][2:] == [Segment.FROZEN] * (len(layout.tensors) - 2)


def test_features_and_the_output_layer_give_the_models_logits() -> None:
    bound = bound_model("head")
    photos = torch.randn(4, 3, 32, 32)
    bound.module.eval()
    with torch.inference_mode():
        expected = bound.module(photos)
    features = bound.features(photos)
    assert features.shape == (4, 64)
    torch.testing.assert_close(bound.logits(features), expected)


class Scaled(nn.Module):
    """A model with a step after its output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = 2 * self.head(images.mean((2, 3)).repeat(1, 4)) + 1
        return logits


def test_a_step_after_the_output_layer_is_refused() -> None:
    bound = bound_model("head", module=Scaled())
    with pytest.raises(ModelError, match="last step is its output layer"):
        bound.features(torch.randn(2, 3, 8, 8))


def test_a_model_without_a_linear_output_layer_is_refused() -> None:
    with pytest.raises(ModelError, match="no output layer"):
        bound_model("head", module=nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
