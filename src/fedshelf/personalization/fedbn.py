"""FedBN: Li et al. 2021, "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", Algorithm 1.

    server:                                             client k:
     1  for each round t:                                4  for each layer l that is not batch normalization:
     2    each k: w_k of all layers that are               5    w_k^l <- w^l
          not batch normalization                         6  train all of w_k on its own photos
     3    w^l <- sum_k n_k/n · w_k^l                       7  send w_k^l of those layers; keep the others

Layers are identified by type, never by name.

Differs from the paper: the paper averages uniformly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedshelf.core.errors import ModelError
from fedshelf.personalization.base import PersonalLayers

if TYPE_CHECKING:
    from fedshelf.personalization.base import nn


def personal_names(module: nn.Module) -> frozenset[str]:
    """Names of the scale, shift and statistics of all batch-norm layers.

    Raises:
        ModelError: the model has none.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    names = frozenset(
        f"{layer}.{name}" if layer else name
        for layer, child in module.named_modules()
        if isinstance(child, _BatchNorm)
        for name, tensor in child.state_dict().items()
        if tensor.is_floating_point()
    )
    if not names:
        raise ModelError(
            "--personalize fedbn keeps batch-norm layers at the stores, and this model has none: use --norm batch, "
            "another --model, or --personalize fedper"
        )
    return names


FEDBN = PersonalLayers(names=personal_names)
