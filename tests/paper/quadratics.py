"""Clients whose loss is a quadratic, trained by the real loop: where everything can be worked out by hand.

Client i's loss is 1/2 · sum_j a_ij · (w_j - b_ij)², its gradient a_i · (w - b_i). Shapes: T trainable values.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedshelf.algorithms.aggregation import combine
from fedshelf.algorithms.base import Algorithm
from fedshelf.algorithms.reduce import MEAN
from fedshelf.core.messages import Broadcast, Purpose, TaskKey, Upload, auxiliary_vectors
from fedshelf.core.state import ClientState, ModelState
from fedshelf.training import loop
from fedshelf.training.loop import LocalRun
from fedshelf.training.settings import TrainingSettings
from fedshelf.training.trainer import Trainer
from tests.worlds import PLAIN, bound_model, trainer

NUM_VALUES = bound_model().params.layout.num_trainable  # T


@dataclass(frozen=True, eq=False)
class Quadratic:
    """One client's loss: curvatures [T] and where it is smallest [T]."""

    curvature: Tensor
    minimum: Tensor

    def gradient(self, values: Tensor) -> Tensor:
        return self.curvature * (values - self.minimum)


def drifting(count: int = 2) -> list[Quadratic]:
    """Clients of different curvatures and minima: local steps lead each of them away from the common optimum."""
    draw = torch.Generator().manual_seed(3)
    return [
        Quadratic(torch.rand(NUM_VALUES, generator=draw) * 4 + 0.5, torch.randn(NUM_VALUES, generator=draw))
        for _ in range(count)
    ]


def optimum(clients: Sequence[Quadratic]) -> Tensor:
    """[T]: where the mean of the clients' losses is smallest."""
    return sum((c.curvature * c.minimum for c in clients), torch.zeros(NUM_VALUES)) / sum(
        (c.curvature for c in clients), torch.zeros(NUM_VALUES)
    )


def trains_on(quadratic: Quadratic, *, name: str = "a", settings: TrainingSettings = PLAIN) -> Trainer:
    """A trainer whose loss is `quadratic`, whatever its photos show."""

    def differentiate(local_runs: Sequence[LocalRun]) -> Sequence[Tensor]:
        (local_run,) = local_runs
        values = local_run.bound.params.trainable
        local_run.bound.gradients[:NUM_VALUES] = quadratic.gradient(values)
        return [(quadratic.curvature * (values - quadratic.minimum).square()).sum() / 2]

    def run(local_run: LocalRun) -> float:
        started = time.perf_counter()
        loop.train([local_run], differentiate)
        return time.perf_counter() - started

    return replace(trainer(name, bench=bound_model(settings=settings)), run=run)


@dataclass
class Federation:
    """Rounds by hand: the algorithm's two halves and the aggregation, nothing else of the system."""

    algorithm: Algorithm
    trainers: Mapping[str, Trainer]
    lr: float
    state: ModelState = field(default_factory=lambda: ModelState(params=torch.zeros(NUM_VALUES)))
    clients: dict[str, ClientState] = field(default_factory=dict)
    uploads: list[Upload] = field(default_factory=list)
    num_rounds: int = 0

    def round(self, cohort: Iterable[str] | None = None) -> None:
        """Let `cohort` (everybody) train, and all of them be counted."""
        names = sorted(self.trainers if cohort is None else cohort)
        self.uploads = []
        for name in names:
            broadcast = Broadcast(
                key=TaskKey(run_id="r", round=self.num_rounds + 1, attempt=0),
                purpose=Purpose.TRAIN,
                vectors={
                    "params": self.state.params,
                    **auxiliary_vectors(self.algorithm.broadcast(self.state, NUM_VALUES)),
                },
                client_lr=self.lr,
            )
            upload, self.clients[name] = self.algorithm.client_round(
                broadcast, self.clients.get(name, ClientState()), self.trainers[name]
            )
            self.uploads.append(upload)
        weights = [self.algorithm.weight(upload, 0) for upload in self.uploads]
        aggregate, _ = combine(self.uploads, weights, MEAN, num_trainable=NUM_VALUES)
        self.state = self.algorithm.server_update(self.state, aggregate, len(self.trainers))
        self.num_rounds += 1
