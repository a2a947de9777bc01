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

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedshelf.algorithms.base import NOTHING, Aggregate, stepped
from fedshelf.core.messages import Broadcast, Upload
from fedshelf.core.state import ClientState, ServerState
from fedshelf.training.trainer import Trainer

MOMENTUM = "momentum"


@dataclass(frozen=True, slots=True)
class FedAvgM:
    """Averaging with momentum `beta` at the server, whose rate is `server_lr`."""

    server_lr: float
    beta: float
    auxiliary: tuple[str, ...] = ()

    def broadcast(self, state: ServerState, num_trainable: int) -> Mapping[str, Tensor]:
        return NOTHING

    def client_round(self, broadcast: Broadcast, state: ClientState, trainer: Trainer) -> tuple[Upload, ClientState]:
        return trainer.upload(broadcast), state  # lines 6-7

    def weight(self, upload: Upload, staleness: int) -> float:
        return float(upload.num_examples)  # n_k

    def server_update(self, state: ServerState, aggregate: Aggregate, population: int) -> ServerState:
        trainable = aggregate.delta[: aggregate.num_trainable]
        velocity = state.optimizer.get(MOMENTUM, torch.zeros_like(trainable)) * self.beta + trainable  # line 4
        params = stepped(state.params, aggregate, self.server_lr * velocity)  # line 5
        return replace(state, params=params, optimizer={MOMENTUM: velocity})


def fedavgm(settings: Mapping[str, Any]) -> FedAvgM:
    """FedAvgM of a run's settings."""
    beta = settings["server_momentum"]
    return FedAvgM(server_lr=settings["server_lr"] or 1.0, beta=0.5 if beta is None else beta)
