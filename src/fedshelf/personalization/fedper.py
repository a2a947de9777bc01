"""FedPer: Arivazhagan et al. 2019, "Federated Learning with Personalization Layers", Algorithms 1 and 2.

    server:                                             client k:
     1  for each round t:                                4  (w_base, own w_head) <- w, its head of the round before
     2    each k: w_base,k                               5  train both together on its own photos
     3    w_base <- sum_k n_k/n · w_base,k               6  send w_base,k; keep w_head,k

The head is the last layer, which the paper calls K_P = 1 (its experiments keep one to four layers). A model that
averages several classifiers has several.

Differs from the paper: nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedshelf.core.errors import ModelError
from fedshelf.personalization.base import PersonalLayers

if TYPE_CHECKING:
    from fedshelf.personalization.base import nn


def personal_names(module: nn.Module) -> frozenset[str]:
    """Names of the head's tensors.

    Args:
        module: the model.

    Returns:
        Weight and bias of the output layers.

    Raises:
        ModelError: the model has no head.
    """
    from fedshelf.models.head import head_names

    names = head_names(module)
    if not names:
        raise ModelError("--personalize fedper and fedrep keep the last layer at the stores, and this model has none")
    return names


FEDPER = PersonalLayers(names=personal_names)
