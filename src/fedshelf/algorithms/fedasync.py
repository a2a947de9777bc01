"""FedAsync: Xie, Koyejo and Gupta 2019, "Asynchronous Federated Optimization", Algorithm 1.

    server, at version t:                               client, from x_tau:
     1  keep clients at work                             6  x <- x_tau
     2  when one sends x_new, begun at x_tau:            7  for each local epoch, for each batch b:
     3    alpha_t <- alpha · s(t - tau)                  8    x <- x - gamma · (grad l(x; b) + rho · (x - x_tau))
     4    x_{t+1} <- (1 - alpha_t) · x_t + alpha_t · x_new   9  return x_new = x
     5    t <- t + 1

with the polynomial s(t - tau) = (1 + t - tau)^-a (the paper's section 5.2).

Differs from the paper: clients return the difference to x_tau, from which the server computes x_new - x_t (line 4 is
x_t + alpha_t · (x_new - x_t)); staleness is zero for an upload that no other overtook; the proximal term acts on
trainable values, not on batch-norm statistics, which are mixed like weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from fedshelf.algorithms.base import MU, SERVER_LR, Aggregate, Algorithm, Asynchronous, polynomial

if TYPE_CHECKING:
    from fedshelf.algorithms.base import Broadcast, ClientState, ModelState, Tensor, Trainer, Upload


@dataclass(frozen=True, slots=True)
class FedAsync(Asynchronous, Algorithm):
    """FedAsync: one version per upload.

    Attributes:
        alpha: mixing weight.
        rho: strength of the proximal term.
        exponent: exponent of staleness (a).
    """

    alpha: Annotated[float, SERVER_LR] = 0.6
    rho: Annotated[float, MU] = 0.01
    relative_to_present: ClassVar[bool] = True
    ignores: ClassVar[tuple[str, ...]] = ("weights",)

    def problems(self) -> list[str]:
        """Settings that contradict each other, each with its remedy."""
        if self.buffer_size == 1:
            return []
        return [
            f"--buffer-size {self.buffer_size} with --algorithm fedasync: there every upload makes a version. Leave "
            "--buffer-size out, or use --algorithm fedbuff"
        ]

    def client_round(self, broadcast: Broadcast, state: ClientState, trainer: Trainer) -> tuple[Upload, ClientState]:
        bound = trainer.bound_model
        anchor = broadcast.params[: bound.params.layout.num_trainable].to(bound.compute.device)  # x_tau

        def proximal(gradient: Tensor, values: Tensor) -> None:
            gradient.add_(values - anchor, alpha=self.rho)  # line 8

        return trainer.upload(broadcast, gradient_hook=proximal if self.rho else None), state

    def weight(self, upload: Upload, staleness: int) -> float:
        return self.alpha * polynomial(staleness, self.exponent)  # line 3

    def server_update(self, state: ModelState, aggregate: Aggregate, population: int) -> ModelState:
        return replace(state, params=state.params + aggregate.mean_weight * aggregate.delta)  # line 4
