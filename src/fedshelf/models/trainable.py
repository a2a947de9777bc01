"""What is trained of a model, and what stays frozen. Tensors are selected by the type of their layer.

all       everything
head      the output layer alone
norm      the output layer, and the scales and shifts of normalization layers
adapter   the output layer, and the adapters of the other linear layers (`adapters`)
sales     the sales tower alone (`sales`)

The sales tower is always trained, if there is one.
"""

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from fedshelf.core.choices import TrainName
from fedshelf.core.errors import ModelError
from fedshelf.models.adapters import trained_names
from fedshelf.models.head import head_names
from fedshelf.models.sales import tower_names

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def frozen_names(module: nn.Module, train: TrainName, *, freeze_norm: bool) -> frozenset[str]:
    """Names of the floating-point tensors that training leaves as they are.

    Args:
        module: the model, with its adapters if there are any.
        train: what is trained.
        freeze_norm: whether the statistics of batch normalization stay as they are, too; then the layers normalize with
            them in training, as in evaluation.

    Raises:
        ModelError: the model has no output layer to train alone.
    """
    statistics = frozenset(
        _join(layer, name)
        for layer, child in module.named_modules()
        if isinstance(child, _NormBase)
        for name, buffer in child.named_buffers(recurse=False)
        if buffer.is_floating_point()
    )
    if train == "all":
        return statistics if freeze_norm else frozenset()
    head, tower = head_names(module), tower_names(module)
    if train == "sales":
        return frozenset(_floating_names(module)) - tower
    if not head:
        raise ModelError(f"--train {train}: this model has no output layer that could be found. Use --train all")
    trained = head | tower | trained_names(module) | (_affine_names(module) if train == "norm" else frozenset())
    if train == "norm" and not freeze_norm:
        trained |= statistics
    return frozenset(_floating_names(module)) - trained


def _affine_names(module: nn.Module) -> frozenset[str]:
    """The scales and shifts of normalization layers."""
    return frozenset(
        _join(layer, name)
        for layer, child in module.named_modules()
        if isinstance(child, _NORMS)
        for name, _ in child.named_parameters(recurse=False)
    )


def _floating_names(module: nn.Module) -> Iterator[str]:
    yield from (name for name, _ in module.named_parameters())
    yield from (name for name, buffer in module.named_buffers() if buffer.is_floating_point())


def _join(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name
