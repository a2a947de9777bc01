"""Ridge regression on frozen features, exact for any distribution of the photos over stores: Fanì et al. 2024,
"Accelerating Heterogeneous Federated Learning with Closed-form Classifiers" (Fed3R), eq. 4 to 7; also He et al. 2025,
"AFL: A Single-Round Analytic Approach for Federated Learning with Pre-trained Models".

    client k:                                               server:
     1  F <- features of its photos and a constant 1         4  A <- A + sum_k A_k;  B <- B + sum_k B_k
     2  A_k <- F^T F;  B_k <- F^T Y                          5  for each lambda of a grid, from training photos alone:
     3  send A_k and B_k, minus what it sent before               W <- (A + lambda · s · R)^-1 B
     6  count what each W gets right on its validation       7  choose lambda and a temperature by the counts
        photos, and its loss at each temperature             8  W <- (A + lambda · s · R)^-1 B from all photos

Of the values of lambda, the largest is chosen whose count is at most one standard error below the best one: stores hold
out photos that are much like those they train on, which favors too small values (Breiman et al. 1984, section 3.4.3).

Y has a one in the column of each photo's class. s is the mean diagonal of A without the constant's entry; R is the
identity without that entry, so that the intercept is not shrunk. Logits are W^T f divided by the temperature, which
turns a regression into a classifier with probabilities.

A and B are sums over photos: it does not matter which store holds which photo. Products that are added, photos that are
corrected and stores that withdraw change the sums by a difference, and the model becomes what it would be without ever
having seen what was taken out.

Differs from the paper: features are those of photos as they are evaluated, without random Fourier features; lambda is
relative to s, and chosen by the stores' counts; there is a temperature; sums are float64. Without validation photos
lambda is 0.01 and the temperature 1. In a round in which no store has any, the last choice stays. What stores report of
the new model is of the one from training photos alone: the final one has seen the photos that they would count on.

Shapes: N photos, D features, E = D + 1, K classes, G values of lambda, H = K·E values of a head: its weight [K, D] and
bias [K].
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from fedshelf.algorithms.base import Aggregate, Algorithm, Candidates, VectorSpec, grown_model
from fedshelf.core.bounds import MAX_FLOAT
from fedshelf.core.errors import ModelError, RefusedError, TrainingError
from fedshelf.core.settings import Scope, Setting
from fedshelf.core.text import counted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from fedshelf.algorithms.base import (
        Broadcast,
        CandidateScore,
        ClientState,
        Growth,
        ModelState,
        Tensor,
        Trainer,
        Upload,
    )
    from fedshelf.core.params import Layout

LAMBDAS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
TEMPERATURES = tuple(2 ** (-step / 2) for step in range(13))  # 1 to 1/64: regression gives small differences
DEFAULT_LAMBDA, DEFAULT_TEMPERATURE = 1e-2, 1.0
GRAM, MOMENTS = "gram", "moments"
HELD_OUT = "held_out."
"""Prefix of the sums over validation photos, which join the others for the final head."""
CHOSEN = "chosen"
"""Name of the server's vector [2] with lambda and the temperature."""
TASK = "task"
"""Name of the client's vector [2] with round and attempt of the task that its sums were sent for."""
SLACK = 1e-6
"""Relative error that rounding may make in what holds exactly for sums over photos."""

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

    def taken(self, values: Tensor) -> Tensor:
        """The solution [E, K], float64, from its values in the order of a model's."""
        import torch

        weight, bias = values.split([self.num_classes * self.num_features, self.num_classes])
        return torch.cat([weight.view(self.num_classes, -1).T, bias[None]]).double()

    def put(self, params: Tensor, solution_EK: Tensor) -> Tensor:
        """A copy of the model with this output layer, rounded to float32."""
        params = params.clone()
        weight = params[self.weight : self.weight + self.num_classes * self.num_features]
        weight.copy_(solution_EK[:-1].T.reshape(-1))
        params[self.bias : self.bias + self.num_classes].copy_(solution_EK[-1])
        return params


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Solution:
    """An output layer in closed form, and what is needed to add photos to it.

    Attributes:
        weights: W [E, K], float64, not divided by the temperature.
        inverse: (A + lambda · s · R)^-1 [E, E], float64.
        temperature: logits are divided by it.
    """

    weights: Tensor
    inverse: Tensor
    temperature: float


@dataclass(frozen=True, slots=True)
class Ridge(Algorithm):
    """The output layer in closed form, from sums over the stores.

    Attributes:
        ridge_lambda: lambda; None: the stores choose.
        head: the output layer; None until the model is known.
    """

    ridge_lambda: Annotated[float | None, Setting(help="Regularization, as a multiple of the features' mean square sum "
        "(default: chosen by the stores' validation photos).", gt=0, scope=Scope.SERVER)] = None  # fmt: skip
    head: Head | None = None
    sums: ClassVar[bool] = True
    counts_photos: ClassVar[bool] = True
    ignores: ClassVar[tuple[str, ...]] = (
        "optimizer", "client_lr", "lr_schedule", "warmup_rounds", "local_epochs", "dynamic_batch", "momentum",
        "weight_decay", "label_smoothing", "gradient_clip", "backbone_lr_factor", "head_lr_factor", "unfreeze_after",
        "augment", "feature_views", "loss", "warm_start", "refit_head", "average_rounds", "weights", "clip_norm",
        "clipping",
    )  # fmt: skip

    def for_model(self, layout: Layout, head: str) -> Ridge:
        return replace(self, head=Head.of(layout, head))

    def vectors(self, layout: Layout) -> Mapping[str, VectorSpec]:
        from fedshelf.core.messages import AUXILIARY, DELTA

        sums = {AUXILIARY + name: VectorSpec(size, "float64") for name, size in _shapes(self._head).items()}
        return {DELTA: VectorSpec(0), **sums}

    def client_round(self, broadcast: Broadcast, state: ClientState, trainer: Trainer) -> tuple[Upload, ClientState]:
        import torch

        from fedshelf.core.messages import DELTA, Upload, auxiliary_vectors

        _check_state(broadcast, state)
        started = time.perf_counter()
        trainer.bound_model.load(broadcast.params)
        own: dict[str, Tensor] = {}
        for prefix, photos in (("", trainer.train), (HELD_OUT, trainer.validation)):
            found = _sums(trainer.features(photos), photos.labels, self._head)
            own |= {prefix + name: tensor for name, tensor in found.items()}
        change = {name: tensor - state.algorithm[name] if state.algorithm else tensor for name, tensor in own.items()}
        upload = Upload(
            key=broadcast.key, vectors={DELTA: broadcast.params.new_zeros(0), **auxiliary_vectors(change)},
            num_examples=len(trainer.train) + len(trainer.validation), num_steps=0, train_loss=None,
            seconds=time.perf_counter() - started,
        )  # fmt: skip
        task = torch.tensor([broadcast.key.round, broadcast.key.attempt], dtype=torch.float64)
        return upload, replace(state, algorithm={**own, TASK: task})

    def checked(self, upload: Upload, *, num_photos: int, num_counted: int) -> Upload:
        """Refuse sums that are those of no photos, or of another number of photos."""
        change = 0.0
        for prefix in ("", HELD_OUT):
            gram, moments = upload.auxiliary[prefix + GRAM], upload.auxiliary[prefix + MOMENTS]
            change += _check_sums(gram, moments.view(self._head.num_rows, -1), is_difference=num_counted > 0)
        if abs(num_counted + change - num_photos) > SLACK * max(1, num_photos) or upload.num_examples != num_photos:
            raise RefusedError(
                f"its sums count {num_counted + change:,.10g}, it claims {counted(upload.weight, 'photo')}, and "
                f"joined with {num_photos:,}"
            )
        return upload

    def weight(self, upload: Upload, staleness: int) -> float:
        return 1.0  # sums of more photos are larger

    def server_update(self, state: ModelState, aggregate: Aggregate, population: int) -> ModelState:
        # Line 4; a plain mean times its number is a sum.
        total = self._added(state, {name: aggregate.num_clients * sums for name, sums in aggregate.auxiliary.items()})
        self._check_solvable(total)
        chosen = total[GRAM].new_tensor([self.ridge_lambda or DEFAULT_LAMBDA, DEFAULT_TEMPERATURE])
        state = replace(state, optimizer=total | {CHOSEN: state.optimizer.get(CHOSEN, chosen)})
        return self._solved(state)

    def at_fault(self, state: ModelState, uploads: Mapping[str, Upload]) -> Mapping[str, str]:
        """The clients whose sums, alone or after those of the others, make the system unsolvable."""
        found: dict[str, str] = {}

        def is_usable(name: str, before: ModelState) -> ModelState | None:
            total = self._added(before, uploads[name].auxiliary)
            try:
                self._check_solvable(total)
            except RefusedError as error:
                found[name] = str(error)
                return None
            return replace(before, optimizer=total)

        alone = [name for name in sorted(uploads) if is_usable(name, state)]
        for name in sorted(alone, key=lambda name: float(uploads[name].auxiliary[GRAM].norm())):
            state = is_usable(name, state) or state
        return found

    def candidates(self, state: ModelState) -> Candidates | None:
        import torch

        if not _num_photos(state.optimizer[HELD_OUT + GRAM]):
            return None  # no store has validation photos
        solve = _Solver(state.optimizer[GRAM], state.optimizer[MOMENTS], self._head)
        heads = [solve(scale) for scale in self._lambdas]  # line 5
        values = torch.cat([part for head in heads for part in (head[:-1].T.reshape(-1), head[-1])]).float()
        return Candidates(values, len(heads), len(TEMPERATURES))

    def score_candidates(self, broadcast: Broadcast, trainer: Trainer) -> tuple[CandidateScore, ...]:
        from fedshelf.core.messages import CANDIDATES, MAX_CANDIDATES

        head, heads = self._head, broadcast.auxiliary[CANDIDATES]
        size = head.num_classes * head.num_rows
        if len(heads) % size or len(heads) > MAX_CANDIDATES * size:
            raise RefusedError(f"{len(heads):,} values are not some output layers of {size:,}")
        return _scores([head.taken(one) for one in heads.view(-1, size)], trainer)  # line 6

    def choose(
        self, state: ModelState, scores: Sequence[CandidateScore], num_photos: float
    ) -> tuple[ModelState, Tensor]:  # fmt: skip
        best, temperature = _best(scores, num_photos)
        chosen = self._lambdas[best]
        logger.info("ridge: lambda %g and temperature %.3g are chosen on validation photos", chosen, temperature)
        values = state.optimizer[GRAM].new_tensor([chosen, temperature])
        held_out = _Solver(state.optimizer[GRAM], state.optimizer[MOMENTS], self._head)(chosen) / temperature
        solved = self._solved(replace(state, optimizer={**state.optimizer, CHOSEN: values}))
        return solved, self._head.put(state.params, held_out)

    def grow_server(self, state: ModelState, growth: Growth) -> ModelState:
        """The state with a column of zeros for each new class in B: what it would be with these classes from the start,
        since photos of other classes have never been a part of A or B."""
        state = replace(grown_model(state, growth), optimizer=_grown_sums(state.optimizer, growth, self._head))
        return self._solved(state) if state.optimizer else state

    def grow_client(self, kept: Mapping[str, Tensor], growth: Growth) -> Mapping[str, Tensor]:
        return _grown_sums(kept, growth, self._head)

    def solve_alone(self, params: Tensor, trainer: Trainer) -> Tensor:
        head = self._head
        trainer.bound_model.load(params)
        sums = _sums(trainer.features(trainer.train), trainer.train.labels, head)
        solve = _Solver(sums[GRAM], sums[MOMENTS], head)
        if not len(trainer.validation):
            return head.put(params, solve(self.ridge_lambda or DEFAULT_LAMBDA) / DEFAULT_TEMPERATURE)
        heads = [solve(scale) for scale in self._lambdas]
        best, temperature = _best(_scores(heads, trainer), len(trainer.validation))
        return head.put(params, heads[best] / temperature)

    def solution(self, state: ModelState) -> Tensor:
        """W [E, K] of all photos (line 8), float64, divided by the temperature."""
        solve, scale, temperature = self._of_all_photos(state)
        found: Tensor = solve(scale) / temperature
        return found

    def extensible_solution(self, state: ModelState) -> Solution:
        """The solution of all photos, to which photos can be added without the sums."""
        import torch

        solve, scale, temperature = self._of_all_photos(state)
        inverse_EE = torch.cholesky_inverse(solve.factor(scale))
        return Solution(weights=solve(scale), inverse=inverse_EE, temperature=temperature)

    def _of_all_photos(self, state: ModelState) -> tuple[_Solver, float, float]:
        """The system of all photos, with the chosen lambda and temperature."""
        gram, moments = (state.optimizer[name] + state.optimizer[HELD_OUT + name] for name in (GRAM, MOMENTS))
        scale, temperature = state.optimizer[CHOSEN].tolist()
        return _Solver(gram, moments, self._head), scale, temperature

    def _solved(self, state: ModelState) -> ModelState:
        return replace(state, params=self._head.put(state.params, self.solution(state)))

    def _added(self, state: ModelState, change: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums after a change; exactly zero where no photo is left."""
        total = {name: state.optimizer.get(name, 0.0) + change[name] for name in _shapes(self._head)}
        for prefix in ("", HELD_OUT):
            if not _num_photos(total[prefix + GRAM]):
                for name in (prefix + GRAM, prefix + MOMENTS):
                    total[name] = total[name].new_zeros(len(total[name]))
        return total

    def _check_solvable(self, total: Mapping[str, Tensor]) -> None:
        """Check that the head can be solved for at any lambda, from all photos and from training photos alone.

        Raises:
            RefusedError: the sums are not those of any photos.
        """
        for gram in (total[GRAM], total[GRAM] + total[HELD_OUT + GRAM]):
            _Solver(gram, total[MOMENTS], self._head).factor(self._lambdas[0])

    @property
    def _lambdas(self) -> tuple[float, ...]:
        """The values of lambda to choose among, ascending."""
        return LAMBDAS if self.ridge_lambda is None else (self.ridge_lambda,)

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
        self._scale = float(self._gram_EE.diagonal()[:-1].mean()) or 1.0

    def __call__(self, scale: float) -> Tensor:
        """W [E, K], float64.

        Raises:
            RefusedError: the sums are not those of any photos.
        """
        import torch

        solution: Tensor = torch.cholesky_solve(self._moments_EK, self.factor(scale))
        return solution

    def factor(self, scale: float) -> Tensor:
        """The Cholesky factor of A + lambda · s · R [E, E].

        Raises:
            RefusedError: the sums are not those of any photos.
        """
        import torch

        damped = self._gram_EE.clone()
        damped.diagonal()[:-1] += scale * self._scale
        damped.diagonal()[-1:] += 1e-9 * max(float(damped[-1, -1]), 1.0)  # of the constant: keeps it solvable
        factor, problem = torch.linalg.cholesky_ex(damped)
        if problem:
            raise RefusedError("the sums are not those of any photos: the output layer cannot be computed")
        result: Tensor = factor
        return result


def _check_state(broadcast: Broadcast, state: ClientState) -> None:
    """Check that the server's sums hold what this client takes its difference from.

    Raises:
        TrainingError: its own state is lost or older, or the server's is.
    """
    known = tuple(int(number) for number in state.algorithm[TASK]) if state.algorithm else None
    at_server = None if broadcast.counted is None else (broadcast.counted.round, broadcast.counted.attempt)
    if known == at_server:
        return
    here, there = (f"those of round {task[0]}" if task else "none" for task in (known, at_server))
    raise TrainingError(
        f"the sums of this store that are in the model ({there}) are not the last ones known here ({here}), so it "
        "cannot send a difference. Restore the older one, the state directory here or the checkpoints at the server, "
        "from a copy, or start a new run",
        will_repeat=True,
    )


def _check_sums(gram: Tensor, moments_EK: Tensor, *, is_difference: bool) -> float:
    """Check what holds for sums over any photos, of which each has one product.

    Args:
        gram: the upper triangle of A.
        moments_EK: B.
        is_difference: whether these are differences of such sums.

    Returns:
        Their number of photos, or its change.

    Raises:
        RefusedError: something does not hold.
    """
    import torch

    size = len(moments_EK)
    ends_E = torch.arange(size, 0, -1).cumsum(0)  # of the rows of the triangle
    sums_E, counts_K = gram[ends_E - 1], moments_EK[-1]
    largest = max(1.0, float(sums_E.abs().max()))
    if not bool((moments_EK.sum(1) - sums_E).abs().max() <= SLACK * largest):
        raise RefusedError("its sums per product do not add up to those of all photos")
    if not is_difference:
        squares_E = gram[ends_E - torch.arange(size, 0, -1)]
        if float(squares_E.min()) < 0 or float(counts_K.min()) < 0:
            raise RefusedError("it has sums of squares, or numbers of photos, below zero")
        rows, columns = torch.triu_indices(size, size)
        roots_E, slack = squares_E.sqrt(), 1 + SLACK
        is_bound = (gram.abs() <= slack * roots_E[rows] * roots_E[columns]).all() and (
            moments_EK.abs() <= slack * roots_E[:, None] * counts_K.sqrt()
        ).all()
        if not is_bound:
            raise RefusedError("its sums of products are larger than its sums of squares allow (Cauchy-Schwarz)")
    return float(sums_E[-1])


def _scores(heads: Sequence[Tensor], trainer: Trainer) -> tuple[CandidateScore, ...]:
    """How each of `heads` (each [E, K]) does on a client's validation photos."""
    import torch
    from torch.nn import functional

    from fedshelf.core.messages import CandidateScore

    features_NE = _with_constant(torch.from_numpy(trainer.features(trainer.validation)))
    labels_N = torch.from_numpy(trainer.validation.labels)
    scores = []
    for head in heads:
        logits_NK = features_NE @ head
        losses = [functional.cross_entropy(logits_NK / t, labels_N, reduction="sum") for t in TEMPERATURES]
        correct = int((logits_NK.argmax(1) == labels_N).sum())
        scores.append(CandidateScore(num_correct=correct, losses=tuple(min(float(x), MAX_FLOAT) for x in losses)))
    return tuple(scores)


def _best(scores: Sequence[CandidateScore], num_photos: float) -> tuple[int, float]:
    """Line 7: the index of the most regularized candidate within a standard error of the best, and its temperature."""
    most = max(score.num_correct for score in scores)
    error = math.sqrt(max(0.0, most * (1 - most / max(num_photos, 1.0))))
    best = max(i for i, score in enumerate(scores) if score.num_correct >= most - error)
    losses = scores[best].losses
    return best, TEMPERATURES[min(range(len(losses)), key=losses.__getitem__)]


def _num_photos(gram: Tensor) -> int:
    """The number of photos that sums are of: the square sum of the constant."""
    return round(float(gram[-1]))


def _shapes(head: Head) -> dict[str, int]:
    """The sizes of all sums by name."""
    gram, moments = head.num_rows * (head.num_rows + 1) // 2, head.num_rows * head.num_classes
    return {GRAM: gram, MOMENTS: moments, HELD_OUT + GRAM: gram, HELD_OUT + MOMENTS: moments}


def _grown_sums(kept: Mapping[str, Tensor], growth: Growth, head: Head) -> dict[str, Tensor]:
    """Sums with columns of zeros in B for new classes; everything else is independent of their number."""
    grown = dict(kept)
    for name in {MOMENTS, HELD_OUT + MOMENTS} & kept.keys():
        moments_EK = kept[name].view(head.num_rows, growth.before)
        grown[name] = moments_EK.new_zeros(head.num_rows, growth.after)
        grown[name][:, : growth.before] = moments_EK
        grown[name] = grown[name].reshape(-1)
    return grown


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
