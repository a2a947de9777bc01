"""Low-rank adapters of linear layers.

    y = W x + b + (alpha / r) B A x        W [out, in] and A [r, in] are frozen, B [out, r] is trained

B starts at zero, so that an adapted model computes what it did before. A is random and the same at all stores: the
mean of the stores' products B A is then the product with the mean of B, and averaging is exact.

Source: Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1; Sun et al. 2024, "Improving
LoRA in Privacy-preserving Federated Learning" (FFA-LoRA). A is drawn as in the authors' code of LoRA.
Differs from the papers: all linear layers but the output layer are adapted, not those of attention alone, and the
output layer is trained as a whole.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fedshelf.core.errors import ModelError
from fedshelf.models.head import head_layers

_TYPES = (nn.Linear, NonDynamicallyQuantizableLinear)  # not their subclasses, which may compute something else


class LoraLinear(nn.Linear):
    """A linear layer with an adapter.

    `weight` is the merged one: evaluation uses it, and so does a model that takes it from the layer. The state dict is
    that of a plain layer with the merged weight; to load one sets W and resets B to zero.

    Attributes:
        lora_a: A.
        lora_b: B.
        scale: alpha / r.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scale: float

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W + (alpha / r) B A."""
        return torch.addmm(self._frozen_weight, self.lora_b, self.lora_a, alpha=self.scale)

    @property
    def _frozen_weight(self) -> Tensor:
        return cast(Tensor, self._parameters["weight"])

    def forward(self, input: Tensor) -> Tensor:
        """Compute y; in training without merging, whose backward pass would cost as much as training W itself."""
        if not self.training:
            return F.linear(input, self.weight, self.bias)
        plain = F.linear(input, self._frozen_weight, self.bias)
        return plain + F.linear(F.linear(input, self.lora_a), self.scale * self.lora_b)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()
        del destination[f"{prefix}lora_a"], destination[f"{prefix}lora_b"]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        own = {f"{prefix}lora_a": self.lora_a, f"{prefix}lora_b": torch.zeros_like(self.lora_b)}
        super()._load_from_state_dict({**state_dict, **own}, prefix, *rest)


def add_adapters(module: nn.Module, *, rank: int, alpha: float, seed: int) -> None:
    """Give all linear layers but the output layer an adapter.

    Args:
        module: the model, changed in place; all tensors keep their names.
        rank: r.
        alpha: the scale, times r.
        seed: seed of A.

    Raises:
        ModelError: the model has no such layer.
    """
    head, generator = head_layers(module).values(), torch.Generator().manual_seed(seed)
    linear = [child for child in module.modules() if isinstance(child, nn.Linear) and type(child) in _TYPES]
    layers = [layer for layer in linear if layer not in head]
    if not layers:
        raise ModelError(
            "--train adapter: this model has no linear layers besides its output layer. Use a vision transformer, such "
            "as vit_tiny_patch16_224, or --train norm"
        )
    for layer in layers:
        layer.__class__ = LoraLinear  # keeps tensors and hooks; torch.nn.utils.parametrize does the same
        adapted, bound = cast(LoraLinear, layer), 1 / math.sqrt(layer.in_features)
        a = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
        adapted.lora_a, adapted.lora_b = nn.Parameter(a), nn.Parameter(torch.zeros(layer.out_features, rank))
        adapted.scale = alpha / rank


def trained_names(module: nn.Module) -> frozenset[str]:
    """Names of the adapters' trained tensors."""
    return frozenset(
        f"{name}.lora_b" if name else "lora_b"
        for name, child in module.named_modules()
        if isinstance(child, LoraLinear)
    )
