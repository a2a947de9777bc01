"""FedAvg: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
Algorithm 1.

    server:                                             client k, from w_t:
     1  for each round t:                                5  w <- w_t
     2    S_t <- random set of max(C·K, 1) clients       6  for each local epoch, for each batch b:
     3    each k in S_t: delta_k (in parallel)           7    w <- w - eta · grad l(w; b)
     4    w_{t+1} <- w_t + sum_k n_k/n · delta_k         8  return delta_k = w - w_t

Differs from the paper: clients return the difference to w_t instead of w (the same mean, since the weights sum to one);
local SGD has momentum, weight decay and a clipped gradient unless these are set to zero; batch-norm statistics are
averaged like weights; n sums over the counted clients, not over those drawn (the server does not wait for late or
refused clients).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedshelf.algorithms.base import Aggregate, Algorithm

if TYPE_CHECKING:
    from fedshelf.algorithms.base import ModelState


@dataclass(frozen=True, slots=True)
class FedAvg(Algorithm):
    """Federated averaging; lines 5 to 8 are the default of `Algorithm`."""

    def server_update(self, state: ModelState, aggregate: Aggregate, population: int) -> ModelState:
        return replace(state, params=state.params + aggregate.delta)  # line 4
