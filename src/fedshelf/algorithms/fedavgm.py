"""FedAvgM: Hsu, Qi and Brown 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", section 4.3.

    server:                                             client k, from w_t:
     1  for each round t:                                6  as in FedAvg (McMahan et al. 2017, Algorithm 1)
     2    S_t <- random clients; each k: delta_k         7  return delta_k = w - w_t
     3    delta <- sum_k n_k/n · delta_k
     4    v <- beta · v + delta
     5    w_{t+1} <- w_t + eta_server · v

With beta = 0 and eta_server = 1 it is FedAvg.

Differs from the paper: the paper's delta w points from the local to the global model and is subtracted, ours points the
other way and is added; eta_server is one in the paper; momentum acts on trainable values, batch-norm statistics are
averaged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from fedshelf.algorithms.base import SERVER_LR, SERVER_MOMENTUM, Aggregate, Algorithm, stepped

if TYPE_CHECKING:
    from fedshelf.algorithms.base import ModelState

MOMENTUM = "momentum"


@dataclass(frozen=True, slots=True)
class FedAvgM(Algorithm):
    """Averaging with server momentum; lines 6 and 7 are the default of `Algorithm`.

    Attributes:
        server_lr: eta_server.
        beta: momentum.
    """

    server_lr: Annotated[float, SERVER_LR] = 1.0
    beta: Annotated[float, SERVER_MOMENTUM] = 0.5

    def server_update(self, state: ModelState, aggregate: Aggregate, population: int) -> ModelState:
        trainable = aggregate.delta[: aggregate.num_trainable]
        velocity = state.optimizer.get(MOMENTUM, trainable.new_zeros(len(trainable))) * self.beta + trainable  # line 4
        params = stepped(state.params, aggregate, self.server_lr * velocity)  # line 5
        return replace(state, params=params, optimizer={MOMENTUM: velocity})
