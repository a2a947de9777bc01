"""The interface of personalization: which tensors stay at the store, and how they change.

Independent of the algorithm. Personal tensors are regular client state: changes of a round are committed once the
server has counted its upload.

Shapes: S shared values, P all values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from fedshelf.core.choices import Candidate
from fedshelf.training.phases import Phase

if TYPE_CHECKING:  # re-exported for type checkers
    from torch import Tensor as Tensor
    from torch import nn as nn

    from fedshelf.core.growth import Growth as Growth
    from fedshelf.core.messages import Broadcast as Broadcast
    from fedshelf.core.state import ClientState as ClientState
    from fedshelf.training.bound_model import BoundModel as BoundModel
    from fedshelf.training.trainer import Trainer as Trainer

PERSONAL = "personal"


@dataclass(frozen=True, kw_only=True, slots=True)
class Personalization:
    """A personalization method. By default, no tensor is personal.

    Attributes:
        phases: phases of local training.
        candidates: the models that a store can choose from after the last round: without the global one if the shared
            values are not a complete model, without the personalized one if nothing is personal.
        trains_at_last: whether `finalize` trains; the chosen model can then be retrained on all photos.
        uses: fields of a run's configuration that have an effect with this method, whatever the algorithm ignores.
    """

    phases: tuple[Phase, ...] = (Phase(),)
    candidates: tuple[Candidate, ...] = tuple(Candidate)
    trains_at_last: ClassVar[bool] = False
    uses: ClassVar[tuple[str, ...]] = ()

    def personal_names(self, module: nn.Module) -> frozenset[str]:
        """Names of the tensors that stay at the store and are not sent.

        Raises:
            ModelError: the model has no such tensors.
        """
        return frozenset()

    def apply(self, bound: BoundModel, state: ClientState) -> None:
        """Turn a bound model with the server's shared values into this store's model.

        Args:
            bound: changed in place.
            state: the client's state.
        """

    def without_personal(self, bound: BoundModel) -> None:
        """Turn a bound model with the server's shared values into the global model.

        Args:
            bound: changed in place.
        """

    def update_state(
        self, broadcast: Broadcast, before: ClientState, after: ClientState, trainer: Trainer
    ) -> ClientState:
        """Add the personal tensors to the state after a round.

        Args:
            broadcast: the round's task.
            before: the state before the round.
            after: the algorithm's state after the round.
            trainer: with the bound model after local training.

        Returns:
            The complete state after the round.
        """
        return after

    def grow(self, kept: Mapping[str, Tensor], growth: Growth) -> Mapping[str, Tensor]:
        """The personal tensors in the state of a client, for a model that gets new classes.

        Args:
            kept: the tensors by name.
            growth: the growth.
        """
        return {name: growth.personal(tensor) for name, tensor in kept.items()}

    def finalize(self, broadcast: Broadcast, trainer: Trainer) -> None:
        """After the last round, turn the store's model into the one that it keeps.

        Args:
            broadcast: holds the last global model.
            trainer: with that model, after `apply`, as its bound model.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class PersonalLayers(Personalization):
    """Some tensors are personal: the last segment of the vector (`core.params`), which is not sent.

    Attributes:
        names: returns the names of a module's personal tensors.
        candidates: the local and the personalized model.
    """

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
"""No personalization."""
