"""Ridge regression on frozen features, exact for any distribution of the photos over stores: Fanì et al. 2024,
"Accelerating Heterogeneous Federated Learning with Closed-form Classifiers" (Fed3R), eq. 4 to 7; also He et al. 2025,
"AFL: A Single-Round Analytic Approach for Federated Learning with Pre-trained Models".

    client k:                                               server:
     1  F <- features of its photos and a constant 1         4  A <- A + sum_k A_k;  B <- B + sum_k B_k
     2  A_k <- F^T F;  B_k <- F^T Y                          5  for each lambda of a grid, from training photos alone:
     3  send A_k and B_k, minus what it sent before               W <- (A + lambda · s · R)^-1 B
     6  count what each W gets right on its validation       7  choose lambda and a temperature by the counts
        photos, and its loss at each temperature             8  W <- (A + lambda · s · R)^-1 B from all photos

Y has a one in the column of each photo's class. s is the mean diagonal of A without the constant's entry; R is the
identity without that entry, so that the intercept is not shrunk. Logits are W^T f divided by the temperature, which
turns a regression into a classifier with probabilities.

A and B are sums over photos: it does not matter which store holds which photo. Products that are added, photos that are
corrected and stores that withdraw change the sums by a difference, and the model becomes what it would be without ever
having seen what was taken out.

Differs from the paper: features are those of photos as they are evaluated, without random Fourier features; lambda is
relative to s, and chosen by the stores' counts; there is a temperature; sums are float64. Without validation photos
lambda is 0.01 and the temperature 1.

Shapes: N photos, D features, E = D + 1, K classes, G values of lambda, H = K·E values of a head: its weight [K, D] and
bias [K].
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from fedshelf.algorithms.base import Aggregate, Algorithm, VectorSpec
from fedshelf.core.bounds import MAX_FLOAT
from fedshelf.core.errors import ModelError, RefusedError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from fedshelf.algorithms.base import Broadcast, CandidateScore, ClientState, ModelState, Tensor, Trainer, Upload
    from fedshelf.core.params import Layout

LAMBDAS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
TEMPERATURES = tuple(2 ** (-step / 2) for step in range(13))  # 1 to 1/64: regression gives small differences
DEFAULT_LAMBDA, DEFAULT_TEMPERATURE = 1e-2, 1.0
GRAM, MOMENTS = "gram", "moments"
HELD_OUT = "held_out."
"""Prefix of the sums over validation photos, which join the others for the final head."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """Where the output layer lies in the model's vector.

    Attributes:
        weight: offset of its weight [K, D].
        bias: offset of its bias [K].
        num_classes: K.
        num_features: D.
    """

    weight: int
    bias: int
    num_classes: int
    num_features: int

    @classmethod
    def of(cls, layout: Layout, name: str) -> Head:
        """Find the output layer.

        Raises:
            ModelError: it has no bias, or is not trained.
        """
        specs = {spec.name: spec for spec in layout.tensors if spec.offset < layout.num_trainable}
        weight, bias = specs.get(f"{name}.weight"), specs.get(f"{name}.bias")
        if not name or weight is None or bias is None or len(weight.shape) != 2:
            raise ModelError("ridge regression needs a linear output layer with a bias, which all stores share")
        return cls(
            weight=weight.offset, bias=bias.offset, num_classes=weight.shape[0], num_features=weight.shape[1]
        )  # fmt: skip

    @property
    def num_rows(self) -> int:
        """E: rows of the solution."""
        return self.num_features + 1

    def put(self, params: Tensor, solution_EK: Tensor) -> Tensor:
        """A copy of the model with this output layer, rounded to float32."""
        params = params.clone()
        weight = params[self.weight : self.weight + self.num_classes * self.num_features]
        weight.copy_(solution_EK[:-1].T.reshape(-1))
        params[self.bias : self.bias + self.num_classes].copy_(solution_EK[-1])
        return params


@dataclass(frozen=True, slots=True)
class Ridge(Algorithm):
    """The output layer in closed form, from sums over the stores.

    Attributes:
        head: the output layer; None until the model is known.
    """

    head: Head | None = None
    sums: ClassVar[bool] = True

    def for_model(self, layout: Layout, head: str) -> Ridge:
        return replace(self, head=Head.of(layout, head))

    def vectors(self, layout: Layout) -> Mapping[str, VectorSpec]:
        from fedshelf.core.messages import AUXILIARY, DELTA

        sums = {AUXILIARY + name: VectorSpec(size, "float64") for name, size in _shapes(self._head).items()}
        return {DELTA: VectorSpec(0), **sums}

    def client_round(self, broadcast: Broadcast, state: ClientState, trainer: Trainer) -> tuple[Upload, ClientState]:
        from fedshelf.core.messages import DELTA, Upload, auxiliary_vectors
        from fedshelf.training.trainer import evaluate

        if broadcast.counted is not None and not state.algorithm:
            raise TrainingError(  # its state is lost
                "what this store has sent of its sums is in the model, and no longer known here: it cannot send a "
                "difference. Restore its state directory from a copy",
                will_repeat=True,
            )
        started = time.perf_counter()
        trainer.bound_model.load(broadcast.params)
        own: dict[str, Tensor] = {}
        for prefix, photos in (("", trainer.train), (HELD_OUT, trainer.validation)):
            found = _sums(trainer.features(photos), photos.labels, self._head)
            own |= {prefix + name: tensor for name, tensor in found.items()}
        change = {name: tensor - state.algorithm[name] if state.algorithm else tensor for name, tensor in own.items()}
        score = evaluate(trainer.bound_model, trainer.train)
        upload = Upload(
            key=broadcast.key, vectors={DELTA: broadcast.params.new_zeros(0), **auxiliary_vectors(change)},
            num_examples=len(trainer.train) + len(trainer.validation), num_steps=0, train_loss=score.loss or 0.0,
            seconds=time.perf_counter() - started,
        )  # fmt: skip
        return upload, replace(state, algorithm=own)

    def server_update(self, state: ModelState, aggregate: Aggregate, population: int) -> ModelState:
        total = {  # line 4; a plain mean times its number is a sum
            name: state.optimizer.get(name, 0.0) + aggregate.num_clients * aggregate.auxiliary[name]
            for name in _shapes(self._head)
        }
        return self._solved(replace(state, optimizer=total), DEFAULT_LAMBDA, DEFAULT_TEMPERATURE)

    def candidates(self, state: ModelState) -> Tensor | None:
        import torch

        held_out = state.optimizer[HELD_OUT + MOMENTS]
        if not held_out.any():
            return None  # no store has validation photos
        solve = _Solver(state.optimizer[GRAM], state.optimizer[MOMENTS], self._head)
        heads = [solve(scale) for scale in LAMBDAS]  # line 5
        return torch.cat([part for head in heads for part in (head[:-1].T.reshape(-1), head[-1])]).float()

    def score_candidates(self, broadcast: Broadcast, trainer: Trainer) -> tuple[CandidateScore, ...]:
        import torch
        from torch.nn import functional

        from fedshelf.core.messages import CANDIDATES, MAX_CANDIDATES, CandidateScore

        head, heads = self._head, broadcast.auxiliary[CANDIDATES]
        size = head.num_classes * head.num_rows
        if len(heads) % size or len(heads) > MAX_CANDIDATES * size:
            raise RefusedError(f"{len(heads):,} values are not some output layers of {size:,}")
        features_NE = _with_constant(torch.from_numpy(trainer.features(trainer.validation)))
        labels_N = torch.from_numpy(trainer.validation.labels)
        scores = []
        for one in heads.view(-1, size):  # line 6
            weight, bias = one.split([head.num_classes * head.num_features, head.num_classes])
            solution = torch.cat([weight.view(head.num_classes, -1).T, bias[None]]).double()
            logits_NK = features_NE @ solution
            losses = [functional.cross_entropy(logits_NK / t, labels_N, reduction="sum") for t in TEMPERATURES]
            correct = int((logits_NK.argmax(1) == labels_N).sum())
            scores.append(CandidateScore(num_correct=correct, losses=tuple(min(float(x), MAX_FLOAT) for x in losses)))
        return tuple(scores)

    def choose(self, state: ModelState, scores: Sequence[CandidateScore]) -> tuple[ModelState, int]:
        best = max(range(len(scores)), key=lambda i: (scores[i].num_correct, -min(scores[i].losses), -i))  # line 7
        losses = scores[best].losses
        temperature = TEMPERATURES[min(range(len(losses)), key=losses.__getitem__)]
        logger.info("ridge: lambda %g and temperature %.3g do best on validation photos", LAMBDAS[best], temperature)
        return self._solved(state, LAMBDAS[best], temperature), best

    def _solved(self, state: ModelState, scale: float, temperature: float) -> ModelState:
        """The state with the head of all photos (line 8)."""
        gram, moments = (state.optimizer[name] + state.optimizer[HELD_OUT + name] for name in (GRAM, MOMENTS))
        solution = _Solver(gram, moments, self._head)(scale) / temperature
        return replace(state, params=self._head.put(state.params, solution))

    @property
    def _head(self) -> Head:
        if self.head is None:
            raise ModelError("ridge regression is asked for sums before its model is known")
        return self.head


class _Solver:
    """Solves for the head at any lambda.

    Args:
        gram: the upper triangle of A, [E·(E + 1) / 2].
        moments: B, [E·K].
        head: the output layer.
    """

    def __init__(self, gram: Tensor, moments: Tensor, head: Head) -> None:
        import torch

        size = head.num_rows
        self._gram_EE = gram.new_zeros(size, size)
        rows, columns = torch.triu_indices(size, size)
        self._gram_EE[rows, columns] = gram
        self._gram_EE[columns, rows] = gram
        self._moments_EK = moments.view(size, head.num_classes)
        self._scale = float(self._gram_EE.diagonal()[:-1].mean())

    def __call__(self, scale: float) -> Tensor:
        """W [E, K], float64.

        Raises:
            RefusedError: the sums are not those of any photos.
        """
        import torch

        damped = self._gram_EE.clone()
        damped.diagonal()[:-1] += scale * self._scale
        damped.diagonal()[-1:] += 1e-9 * max(float(damped[-1, -1]), 1.0)  # of the constant: keeps it solvable
        factor, problem = torch.linalg.cholesky_ex(damped)
        if problem:
            raise RefusedError("the sums of the stores are not those of any photos: one of them has sent nonsense")
        solution: Tensor = torch.cholesky_solve(self._moments_EK, factor)
        return solution


def _shapes(head: Head) -> dict[str, int]:
    """The sizes of all sums by name."""
    gram, moments = head.num_rows * (head.num_rows + 1) // 2, head.num_rows * head.num_classes
    return {GRAM: gram, MOMENTS: moments, HELD_OUT + GRAM: gram, HELD_OUT + MOMENTS: moments}


def _sums(features_ND: NDArray[np.float32], labels: NDArray[np.int64], head: Head) -> dict[str, Tensor]:
    """A's upper triangle and B of some photos (line 2), float64."""
    import torch

    features_NE, labels_N = _with_constant(torch.from_numpy(features_ND)), torch.from_numpy(labels)
    gram_EE = features_NE.T @ features_NE
    moments_EK = features_NE.new_zeros(head.num_rows, head.num_classes)
    moments_EK.index_add_(1, labels_N, features_NE.T)
    rows, columns = torch.triu_indices(head.num_rows, head.num_rows)
    return {GRAM: gram_EE[rows, columns], MOMENTS: moments_EK.reshape(-1)}


def _with_constant(features_ND: Tensor) -> Tensor:
    """Features and a constant 1 [N, E], float64."""
    import torch

    features_ND = features_ND.double()
    return torch.cat([features_ND, features_ND.new_ones(len(features_ND), 1)], 1)
