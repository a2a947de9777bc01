"""Low-rank adapters of linear layers."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedshelf.core.errors import ModelError
from fedshelf.models.adapters import LoraLinear, add_adapters
from fedshelf.models.resnet import resnet10
from fedshelf.models.timm_models import import_timm
from fedshelf.models.trainable import frozen_names
from fedshelf.training import stack_check
from fedshelf.training.batches import Batch
from fedshelf.training.bound_model import BoundModel, TrainingSettings
from fedshelf.training.compiled import compile_forward
from fedshelf.training.device import choose
from fedshelf.training.loop import LocalRun, alone

PHOTOS = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def vit() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        made: nn.Module = import_timm().models.vision_transformer.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5
        )
    return made.eval()


class Encoder(nn.Module):
    """A model of torch's own transformer layers, which take weights from their linear layers in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 2, dim_feedforward=32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(24, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.reshape(len(images), -1, 24)
        logits: Tensor = self.head(self.encoder(tokens).mean(1))
        return logits


def adapted(module: nn.Module, *, rank: int = 3, alpha: float = 6.0, seed: int = 1) -> BoundModel:
    add_adapters(module, rank=rank, alpha=alpha, seed=seed)
    settings = TrainingSettings(augmentation=None, batch_size=3)
    frozen = frozen_names(module, "adapter", freeze_norm=False)
    return BoundModel.of(module, compute=choose("cpu", threads=1), settings=settings, frozen_names=frozen)


def trained(bound: BoundModel, *, seed: int = 1) -> BoundModel:
    generator = torch.Generator().manual_seed(seed)
    noise = [Batch(torch.randn(6, 3, 32, 32, generator=generator), torch.arange(6) % 5) for _ in range(3)]
    alone(LocalRun(bound=bound, batches=iter(noise), round=1, client_lr=0.3, num_examples=6))
    return bound


@torch.inference_mode()
def logits(module: nn.Module, *, training: bool = False) -> Tensor:
    found: Tensor = module.train(training)(PHOTOS)
    return found


@pytest.mark.parametrize("make", [vit, Encoder])
def test_a_new_adapter_changes_no_bit_of_the_weights(make: Any) -> None:
    plain = make()
    bound = adapted(copy.deepcopy(plain))
    # The last bits of a product depend on where its matrices lie in memory, on processors without AVX-512.
    torch.testing.assert_close(logits(bound.module), logits(plain), rtol=1e-6, atol=1e-6)
    state = bound.module.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in state.items())


@pytest.mark.parametrize("make", [vit, Encoder])
def test_the_merged_model_computes_what_the_adapted_one_does(make: Any) -> None:
    plain, bound = make(), trained(adapted(make()))
    assert not torch.allclose(logits(bound.module), logits(plain), atol=1e-2), "training has moved it"
    plain.load_state_dict(bound.module.state_dict())
    assert not any(isinstance(layer, LoraLinear) for layer in plain.modules())
    torch.testing.assert_close(logits(plain), logits(bound.module), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(bound.module, training=True), logits(plain), rtol=0, atol=1e-5)


def test_only_adapters_and_the_output_layer_move() -> None:
    bound = adapted(vit())
    before = {name: view.clone() for name, view in bound.params.views().items()}
    trained(bound)
    moved = {name for name, view in bound.params.views().items() if not torch.equal(view, before[name])}
    layers = {name for name, child in vit().named_modules() if isinstance(child, nn.Linear)} - {"head"}
    assert len(layers) == 2 * 4
    assert moved == {"head.weight", "head.bias", *(f"{layer}.lora_b" for layer in layers)}
    size = sum(before[name].numel() for name in moved)
    assert bound.params.layout.num_shared == size
    assert bound.head_range == slice(size - 5 * 32 - 5, size), "it can have a rate of its own"


def test_the_mean_of_uploads_is_the_mean_of_the_stores_weights() -> None:
    stores = [trained(adapted(vit()), seed=seed) for seed in range(4)]
    states = [store.module.state_dict() for store in stores]
    expected = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
    stores[0].load(torch.stack([store.params.shared for store in stores]).mean(0))
    for name, merged in stores[0].module.state_dict().items():
        torch.testing.assert_close(merged, expected[name], rtol=0, atol=1e-6)


def test_rank_and_seed_are_part_of_what_a_store_checks() -> None:
    one, same = adapted(vit()), adapted(vit())
    other_rank, other_seed = adapted(vit(), rank=4), adapted(vit(), seed=2)
    assert one.params.layout.digest == same.params.layout.digest == other_seed.params.layout.digest
    assert torch.equal(one.params.frozen, same.params.frozen)
    assert one.params.layout.digest != other_rank.params.layout.digest
    assert not torch.equal(one.params.frozen, other_seed.params.frozen)


def test_loading_a_published_model_resets_the_adapters() -> None:
    bound = trained(adapted(vit()))
    expected = logits(bound.module)
    bound.module.load_state_dict(bound.module.state_dict())
    assert torch.equal(logits(bound.module), expected)
    assert not any(child.lora_b.any() for child in bound.module.modules() if isinstance(child, LoraLinear))


def test_a_copy_in_one_computation_with_others_has_the_same_gradients() -> None:
    bound = trained(adapted(vit()))
    assert stack_check.find_problem(bound, 32) is None


def test_adapters_can_be_compiled() -> None:
    bound = adapted(vit())
    compiled = compile_forward(bound, 32, backend="eager")
    torch.testing.assert_close(trained(compiled).params.shared, trained(adapted(vit())).params.shared)


def test_layers_with_a_formula_of_their_own_are_left_out() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    module = nn.Sequential(nn.Linear(4, 4), Doubled(4, 4), nn.Linear(4, 2))
    add_adapters(module, rank=1, alpha=1, seed=0)
    assert [type(layer) for layer in module] == [LoraLinear, Doubled, nn.Linear]


@pytest.mark.parametrize("module", [resnet10(5), nn.Linear(4, 2)])
def test_a_model_without_such_layers_is_refused(module: nn.Module) -> None:
    with pytest.raises(ModelError, match="no linear layers besides its output layer"):
        add_adapters(module, rank=1, alpha=1, seed=0)
