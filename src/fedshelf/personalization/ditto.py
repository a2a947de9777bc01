"""Ditto: Li et al. 2021, "Ditto: Fair and Robust Federated Learning Through Personalization", Algorithm 1.

    server:                                             client k, beside what the algorithm does:
     1  for each round t, from w_t:                      4  for each local epoch, for each batch b:
     2    each k: as the algorithm says                  5    g <- grad F_k(v_k; b) + lambda · (v_k - w_t)
     3    w_{t+1} <- as the algorithm says                    v_k <- v_k - eta · g
                                                         6  keep v_k

Line 5's g is the gradient of h_k(v; w) = F_k(v) + lambda/2 · ||v - w||², with the norm squared. v_k begins at the first
w that the client gets; the model that travels is the algorithm's, whole.

Differs from the paper: the term acts on trainable values, not on batch-norm statistics, of which v_k has its own; line
4 is for `--local-epochs` epochs, in an order of their own.
"""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from fedshelf.core.choices import Candidate
from fedshelf.core.messages import Broadcast
from fedshelf.core.state import ClientState
from fedshelf.personalization.base import PERSONAL
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.trainer import Phase, Trainer


@dataclass(frozen=True, slots=True)
class Ditto:
    """A second model at the store, held near the global one with strength `pull` (the paper's lambda)."""

    pull: float
    phases: tuple[Phase, ...] = (Phase(),)
    candidates: tuple[Candidate, ...] = tuple(Candidate)
    trains_at_last: bool = False

    def personal_names(self, module: nn.Module) -> frozenset[str]:
        return frozenset()

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

    def finalize(self, broadcast: Broadcast, trainer: Trainer) -> None:
        """Nothing is left to do: v_k is trained."""
