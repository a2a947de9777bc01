"""What personalization is: which tensors stay at the store, and what becomes of them. Orthogonal to the algorithm.

What stays is client state like any other: what a round made of it holds once the server has counted the round's upload.

Shapes: S shared values, P all values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from fedshelf.core.choices import Candidate
from fedshelf.training.phases import Phase

if TYPE_CHECKING:  # to be imported from here, for type checkers again
    from torch import nn as nn

    from fedshelf.core.messages import Broadcast as Broadcast
    from fedshelf.core.state import ClientState as ClientState
    from fedshelf.training.bound_model import BoundModel as BoundModel
    from fedshelf.training.trainer import Trainer as Trainer

PERSONAL = "personal"


@dataclass(frozen=True, kw_only=True, slots=True)
class Personalization:
    """One paper. What a subclass does not say otherwise: nothing is the store's own.

    Attributes:
        phases: how local training goes.
        candidates: the models that a store can choose among once the rounds are over: no global one where the shared
            values are no whole model, no personalized one where nothing is the store's own.
        trains_at_last: whether `finalize` trains: a model that was chosen can then be made once more, of all photos.
    """

    phases: tuple[Phase, ...] = (Phase(),)
    candidates: tuple[Candidate, ...] = tuple(Candidate)
    trains_at_last: ClassVar[bool] = False

    def personal_names(self, module: nn.Module) -> frozenset[str]:
        """Names of the tensors that stay at the store: they are no part of what travels.

        Raises:
            ModelError: the model has none of the kind.
        """
        return frozenset()

    def apply(self, bound: BoundModel, state: ClientState) -> None:
        """Make the model on the bench, whose shared values are the server's, the one that this store uses."""

    def update_state(
        self, broadcast: Broadcast, before: ClientState, after: ClientState, trainer: Trainer
    ) -> ClientState:
        """`after` (what the algorithm keeps of the round) with what stays at the store.

        Args:
            broadcast: what the round began with.
            before: the state that it began with.
            after: what the algorithm made of that.
            trainer: as local training has left it.
        """
        return after

    def finalize(self, broadcast: Broadcast, trainer: Trainer) -> None:
        """Once the rounds are over, make the model that this store used in them the one that it is to keep.

        Args:
            broadcast: brings the last global model.
            trainer: on its bench is that model, made the store's by `apply`.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class PersonalLayers(Personalization):
    """Some tensors stay: the last segment of the vector (`core.params`), which is not in the wire's layout."""

    names: Callable[[nn.Module], frozenset[str]]
    candidates: tuple[Candidate, ...] = (Candidate.LOCAL, Candidate.PERSONALIZED)

    def personal_names(self, module: nn.Module) -> frozenset[str]:
        return self.names(module)

    def apply(self, bound: BoundModel, state: ClientState) -> None:
        bound.params.personal.copy_(state.personalization.get(PERSONAL, bound.initial_personal))

    def update_state(
        self, broadcast: Broadcast, before: ClientState, after: ClientState, trainer: Trainer
    ) -> ClientState:
        personal = trainer.bound_model.params.personal
        if not personal.numel():
            return after
        return replace(after, personalization={PERSONAL: personal.detach().cpu().clone()})


NONE = Personalization(candidates=(Candidate.LOCAL, Candidate.GLOBAL))
"""Nothing stays."""
