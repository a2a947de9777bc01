"""A store's gate between the image model and its sales (`models.sales`) stays at the store.

After the last round, a store compares the model with its sales and its gate, the image model alone, and a model that is
trained on its own photos and sales alone. It keeps the best one, so that sales are used where they help.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedshelf.core.choices import Candidate
from fedshelf.personalization.base import PersonalLayers

if TYPE_CHECKING:
    from fedshelf.personalization.base import BoundModel, nn


def personal_names(module: nn.Module) -> frozenset[str]:
    """Names of the gate's tensors."""
    from fedshelf.models.sales import gate_names

    return gate_names(module)


@dataclass(frozen=True, kw_only=True, slots=True)
class SalesGate(PersonalLayers):
    """The gate is personal. Without it, the shared values are a complete model."""

    candidates: tuple[Candidate, ...] = tuple(Candidate)

    def without_personal(self, bound: BoundModel) -> None:
        bound.params.personal.zero_()  # closed: the image model


SALES_GATE = SalesGate(names=personal_names)
