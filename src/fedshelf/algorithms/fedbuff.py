"""FedBuff: Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation", Algorithms 1 and 2.

    server, at version t:                               client i, from w_t:
     1  keep M clients at work; k <- 0, delta <- 0       8  y <- w_t
     2  when client i sends delta_i, begun at t_i:       9  for each local epoch, for each batch b:
     3    tau_i <- t - t_i                              10    y <- y - eta_l · grad l(y; b)
     4    delta <- delta + s(tau_i) · delta_i           11  return delta_i = y - w_t
     5    k <- k + 1
     6  when k = K: w_{t+1} <- w_t + eta_g · delta / K
     7    t <- t + 1; k <- 0, delta <- 0

with s(tau) = 1 / sqrt(1 + tau). Line 6 divides by K, not by the sum of the s: stale uploads move the model less in
absolute terms, not only relative to fresh ones.

Differs from the paper: its deltas point from the local to the global model and are subtracted; M is the size of a
cohort; batch-norm statistics move to the s-weighted mean of the clients' own, which do not become stale like
gradients (summed as differences to old versions they would oscillate with growing amplitude).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from fedshelf.algorithms.base import BUFFER_SIZE, SERVER_LR, Aggregate, Algorithm, Asynchronous, polynomial, stepped

if TYPE_CHECKING:
    from fedshelf.algorithms.base import ModelState, Upload


@dataclass(frozen=True, slots=True)
class FedBuff(Asynchronous, Algorithm):
    """FedBuff; lines 8 to 11 are the default of `Algorithm`.

    Attributes:
        server_lr: eta_g.
        buffer_size: uploads per version (K).
        exponent: exponent of staleness, 1/2 in the paper.
    """

    server_lr: Annotated[float, SERVER_LR] = 1.0
    buffer_size: Annotated[int, BUFFER_SIZE] = 4
    ignores: ClassVar[tuple[str, ...]] = ("weights",)

    def weight(self, upload: Upload, staleness: int) -> float:
        return polynomial(staleness, self.exponent)  # line 4

    def server_update(self, state: ModelState, aggregate: Aggregate, population: int) -> ModelState:
        trainable = aggregate.delta[: aggregate.num_trainable]  # normalized: the sum is this times K · mean weight
        step = self.server_lr * aggregate.mean_weight * trainable  # line 6
        return replace(state, params=stepped(state.params, aggregate, step))
