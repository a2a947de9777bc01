"""FedProx: Li et al. 2020, "Federated Optimization in Heterogeneous Networks", Algorithm 2.

    server:                                             client k, from w_t:
     1  for each round t:                                4  w <- w_t
     2    S_t <- random clients; each k: delta_k         5  for each local epoch, for each batch b:
     3    w_{t+1} <- w_t + sum_k n_k/n · delta_k         6    g <- grad l(w; b) + mu · (w - w_t)
                                                         7    w <- w - eta · g
                                                         8  return delta_k = w - w_t

Line 6 is the gradient of the local objective h_k(w) = F_k(w) + mu/2 · ||w - w_t||² (the paper's eq. 2), with the norm
squared.

Differs from the paper: clients are drawn uniformly and averaged by number of photos, as in McMahan et al. 2017
(Algorithm 2 draws them by n_k/n and averages uniformly); the local problem is solved by a number of epochs, not to a
given inexactness gamma; the proximal term acts on trainable values, not on batch-norm statistics; gradient clipping
bounds only the loss gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from fedshelf.algorithms.base import MU, Aggregate, Algorithm

if TYPE_CHECKING:
    from fedshelf.algorithms.base import Broadcast, ClientState, ModelState, Tensor, Trainer, Upload


@dataclass(frozen=True, slots=True)
class FedProx(Algorithm):
    """Averaging with a proximal term that keeps local training near the global model.

    Attributes:
        mu: strength of the proximal term.
    """

    mu: Annotated[float, MU] = 0.01

    def client_round(self, broadcast: Broadcast, state: ClientState, trainer: Trainer) -> tuple[Upload, ClientState]:
        bound = trainer.bound_model
        anchor = broadcast.params[: bound.params.layout.num_trainable].to(bound.compute.device)  # w_t

        def proximal(gradient: Tensor, values: Tensor) -> None:
            gradient.add_(values - anchor, alpha=self.mu)  # line 6

        return trainer.upload(broadcast, gradient_hook=proximal), state

    def server_update(self, state: ModelState, aggregate: Aggregate, population: int) -> ModelState:
        return replace(state, params=state.params + aggregate.delta)  # line 3
