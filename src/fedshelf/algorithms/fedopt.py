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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedshelf.algorithms.base import NOTHING, Aggregate, stepped
from fedshelf.core.messages import Broadcast, Upload
from fedshelf.core.state import ClientState, ServerState
from fedshelf.training.trainer import Trainer

MOMENTUM, SECOND_MOMENT = "momentum", "second_moment"
SecondMoment = Callable[[Tensor, Tensor, float], Tensor]
"""Line 6: v_t [T] of v_{t-1} [T], delta² [T] and beta_2."""


def adagrad(previous: Tensor, squared: Tensor, beta2: float) -> Tensor:
    """Of FedAdagrad."""
    return previous + squared


def yogi(previous: Tensor, squared: Tensor, beta2: float) -> Tensor:
    """Of FedYogi."""
    return previous - (1 - beta2) * squared * torch.sign(previous - squared)


def adam(previous: Tensor, squared: Tensor, beta2: float) -> Tensor:
    """Of FedAdam."""
    return beta2 * previous + (1 - beta2) * squared


@dataclass(frozen=True, slots=True)
class FedOpt:
    """Averaging, and an adaptive optimizer at the server.

    Attributes:
        second_moment: which of the three.
        server_lr: eta.
        beta1: of the first moment.
        beta2: of the second; FedAdagrad has none.
        tau: how adaptive: the smaller, the more a value's own history counts.
    """

    second_moment: SecondMoment
    server_lr: float
    beta1: float
    beta2: float
    tau: float
    auxiliary: tuple[str, ...] = ()

    def broadcast(self, state: ServerState, num_trainable: int) -> Mapping[str, Tensor]:
        return NOTHING

    def client_round(self, broadcast: Broadcast, state: ClientState, trainer: Trainer) -> tuple[Upload, ClientState]:
        return trainer.upload(broadcast), state  # lines 9-10

    def weight(self, upload: Upload, staleness: int) -> float:
        return float(upload.num_examples)

    def server_update(self, state: ServerState, aggregate: Aggregate, population: int) -> ServerState:
        delta = aggregate.delta[: aggregate.num_trainable]
        momentum = state.optimizer.get(MOMENTUM, torch.zeros_like(delta))  # line 1
        second = state.optimizer.get(SECOND_MOMENT, torch.full_like(delta, self.tau**2))
        momentum = self.beta1 * momentum + (1 - self.beta1) * delta  # line 5
        second = self.second_moment(second, delta.square(), self.beta2)  # line 6
        step = self.server_lr * momentum / (second.sqrt() + self.tau)  # line 7
        params = stepped(state.params, aggregate, step)
        return replace(state, params=params, optimizer={MOMENTUM: momentum, SECOND_MOMENT: second})


def fedadagrad(settings: Mapping[str, Any]) -> FedOpt:
    """FedAdagrad of a run's settings."""
    return _fedopt(adagrad, settings)


def fedadam(settings: Mapping[str, Any]) -> FedOpt:
    """FedAdam of a run's settings."""
    return _fedopt(adam, settings)


def fedyogi(settings: Mapping[str, Any]) -> FedOpt:
    """FedYogi of a run's settings."""
    return _fedopt(yogi, settings)


def _fedopt(second_moment: SecondMoment, settings: Mapping[str, Any]) -> FedOpt:
    beta1 = settings["server_momentum"]
    return FedOpt(
        second_moment=second_moment, server_lr=settings["server_lr"] or 0.1, beta1=0.9 if beta1 is None else beta1,
        beta2=settings["server_beta2"], tau=settings["server_tau"],
    )  # fmt: skip
