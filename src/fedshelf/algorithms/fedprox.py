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
stated inexactness gamma; the proximal term acts on trainable values, not on batch-norm statistics; a gradient clip
bounds the loss gradient alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedshelf.algorithms.base import NOTHING, Aggregate
from fedshelf.core.messages import Broadcast, Upload
from fedshelf.core.state import ClientState, ServerState
from fedshelf.training.trainer import Trainer


@dataclass(frozen=True, slots=True)
class FedProx:
    """Averaging with a proximal term of strength `mu` that holds local training near the global model."""

    mu: float
    auxiliary: tuple[str, ...] = ()

    def broadcast(self, state: ServerState, num_trainable: int) -> Mapping[str, Tensor]:
        return NOTHING

    def client_round(self, broadcast: Broadcast, state: ClientState, trainer: Trainer) -> tuple[Upload, ClientState]:
        bound = trainer.bound_model
        anchor = broadcast.params[: bound.params.layout.num_trainable].to(bound.compute.device)  # w_t

        def proximal(gradient: Tensor, values: Tensor) -> None:
            gradient.add_(values - anchor, alpha=self.mu)  # line 6

        return trainer.upload(broadcast, gradient_hook=proximal), state

    def weight(self, upload: Upload, staleness: int) -> float:
        return float(upload.num_examples)  # n_k

    def server_update(self, state: ServerState, aggregate: Aggregate, population: int) -> ServerState:
        return replace(state, params=state.params + aggregate.delta)  # line 3


def fedprox(settings: Mapping[str, Any]) -> FedProx:
    """FedProx of a run's settings."""
    return FedProx(mu=settings["mu"])
