"""Ditto: Li et al. 2021, "Ditto: Fair and Robust Federated Learning Through Personalization", Algorithm 1.

    server:                                             client k, in addition to the algorithm:
     1  for each round t, from w_t:                      4  for each local epoch, for each batch b:
     2    each k: as the algorithm says                  5    g <- grad F_k(v_k; b) + lambda · (v_k - w_t)
     3    w_{t+1} <- as the algorithm says                    v_k <- v_k - eta · g
                                                         6  keep v_k

Line 5's g is the gradient of h_k(v; w) = F_k(v) + lambda/2 · ||v - w||², with the norm squared. v_k starts at the first
w that the client receives; the model that is sent is the algorithm's, unchanged.

Differs from the paper: the term acts on trainable values, not on batch-norm statistics, of which v_k has its own; line
4 runs for `--local-epochs` epochs, in its own order of photos.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from fedshelf.core.settings import Setting
from fedshelf.personalization.base import PERSONAL, Personalization

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from fedshelf.personalization.base import BoundModel, Broadcast, ClientState, Growth, Trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Ditto(Personalization):
    """A second model at the store that is kept near the global one.

    Attributes:
        pull: strength of the proximal term (lambda).
    """

    pull: Annotated[float, Setting(key="ditto_lambda", help="How strongly a store's own model is pulled toward "
        "the global one.", ge=0)] = 0.1  # fmt: skip

    def apply(self, bound: BoundModel, state: ClientState) -> None:
        if PERSONAL in state.personalization:
            bound.load(state.personalization[PERSONAL])

    def update_state(
        self, broadcast: Broadcast, before: ClientState, after: ClientState, trainer: Trainer
    ) -> ClientState:
        bound = trainer.bound_model
        anchor = broadcast.params[: bound.params.layout.num_trainable].to(bound.compute.device)  # w_t

        def pull(gradient: Tensor, values: Tensor) -> None:
            gradient.add_(values - anchor, alpha=self.pull)  # line 5

        bound.load(before.personalization.get(PERSONAL, broadcast.params))
        trainer.fit(
            round=broadcast.key.round, client_lr=broadcast.client_lr, gradient_hook=pull,
            part=trainer.part(broadcast.key, "-ditto"), num_steps=broadcast.num_steps,
        )  # fmt: skip
        own = bound.params.shared.detach().cpu().clone()
        return replace(after, personalization={PERSONAL: own})  # line 6

    def grow(self, kept: Mapping[str, Tensor], growth: Growth) -> Mapping[str, Tensor]:
        return {name: growth.shared(tensor) for name, tensor in kept.items()}  # a model of its own
