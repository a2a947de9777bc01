"""FedAdagrad, FedAdam, FedYogi: Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2.

    server:                                             client k, from x_t:
     1  m_{-1} <- 0; v_{-1} <- tau²                      9  as in FedAvg (McMahan et al. 2017, Algorithm 1)
     2  for each round t:                               10  return delta_k = x - x_t
     3    S_t <- random clients; each k: delta_k
     4    delta <- mean of delta_k
     5    m_t <- beta_1 · m_{t-1} + (1 - beta_1) · delta
     6    v_t <- v_{t-1} + delta²                                               (FedAdagrad)
           or v_{t-1} - (1 - beta_2) · delta² · sign(v_{t-1} - delta²)          (FedYogi)
           or beta_2 · v_{t-1} + (1 - beta_2) · delta²                          (FedAdam)
     7    x_{t+1} <- x_t + eta · m_t / (sqrt(v_t) + tau)
     8    (all operations value by value)

With beta_1 = 0, beta_2 = 1 (FedAdam and FedYogi), and eta = 2 · tau it is FedAvg: sqrt(v) stays tau.

Differs from the paper: deltas are averaged by number of photos (the paper's Algorithm 2 averages uniformly, its
experiments as we do); the optimizer acts on trainable values, batch-norm statistics are averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from fedshelf.algorithms.base import SERVER_LR, SERVER_MOMENTUM, Aggregate, Algorithm, grown_model, stepped
from fedshelf.core.settings import Scope, Setting

if TYPE_CHECKING:
    from fedshelf.algorithms.base import Growth, ModelState, Tensor

MOMENTUM, SECOND_MOMENT = "momentum", "second_moment"


def adagrad(previous: Tensor, squared: Tensor, beta2: float) -> Tensor:
    """The second moment of FedAdagrad."""
    return previous + squared


def yogi(previous: Tensor, squared: Tensor, beta2: float) -> Tensor:
    """The second moment of FedYogi."""
    return previous - (1 - beta2) * squared * (previous - squared).sign()


def adam(previous: Tensor, squared: Tensor, beta2: float) -> Tensor:
    """The second moment of FedAdam."""
    return beta2 * previous + (1 - beta2) * squared


@dataclass(frozen=True, slots=True)
class FedOpt(Algorithm):
    """Averaging with an adaptive optimizer at the server; lines 9 and 10 are the default of `Algorithm`.

    Attributes:
        second_moment: line 6: v_t [T] of v_{t-1} [T], delta² [T] and beta_2.
        server_lr: eta.
        beta1: decay of the first moment.
        beta2: decay of the second moment; not used by FedAdagrad.
        tau: adaptivity; smaller values adapt more.
    """

    second_moment: Callable[..., Any]
    server_lr: Annotated[float, SERVER_LR] = 0.1
    beta1: Annotated[float, SERVER_MOMENTUM] = 0.9
    beta2: Annotated[float, Setting(key="server_beta2", help="beta_2 of the second moment.", ge=0, le=1,
        scope=Scope.SERVER)] = 0.99  # fmt: skip
    tau: Annotated[float, Setting(key="server_tau", help="Adaptivity; smaller values adapt more.", gt=0,
        scope=Scope.SERVER)] = 1e-2  # fmt: skip

    def server_update(self, state: ModelState, aggregate: Aggregate, population: int) -> ModelState:
        delta = aggregate.delta[: aggregate.num_trainable]
        momentum = state.optimizer.get(MOMENTUM, delta.new_zeros(len(delta)))  # line 1
        second = state.optimizer.get(SECOND_MOMENT, delta.new_full((len(delta),), self.tau**2))
        momentum = self.beta1 * momentum + (1 - self.beta1) * delta  # line 5
        second = self.second_moment(second, delta.square(), self.beta2)  # line 6
        step = self.server_lr * momentum / (second.sqrt() + self.tau)  # line 7
        params = stepped(state.params, aggregate, step)
        return replace(state, params=params, optimizer={MOMENTUM: momentum, SECOND_MOMENT: second})

    def grow_server(self, state: ModelState, growth: Growth) -> ModelState:
        first = {MOMENTUM: 0.0, SECOND_MOMENT: self.tau**2}  # line 1
        optimizer = {name: growth.trainable(vector, fill=first[name]) for name, vector in state.optimizer.items()}
        return replace(grown_model(state, growth), optimizer=optimizer)


fedadagrad = partial(FedOpt, adagrad, beta2=0.0)
fedadam, fedyogi = partial(FedOpt, adam), partial(FedOpt, yogi)
