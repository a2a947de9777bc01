"""The output layer in closed form, with differential privacy for each photo: Wang 2018, "Revisiting Differentially
Private Linear Regression", Algorithm 2 (AdaSSP).

    client k:
     1  x <- R^T f / ‖R^T f‖ for the features f of each photo
     2  A_k <- sum x x^T + G;  B_k <- sum x y^T + H
        G is symmetric: N(0, s²) off the diagonal, N(0, 2s²) on it;  H: N(0, s²/w²);  s = sigma √(1/2 + w²)
     3  send A_k and B_k, once
    server:
     4  A <- sum_k A_k;  B <- sum_k B_k
     5  e, V <- eigenvalues and eigenvectors of A;  lambda <- c · max(0, -min e)
     6  W <- R V (max(e, 0) + lambda)^-1 V^T B

One photo changes the entries of A above its diagonal, those on it divided by √2, and those of B times w by a vector of
the norm √(‖x‖⁴/2 + w²‖x‖²) <= √(1/2 + w²). So all of it is one Gaussian mechanism with the noise multiplier sigma.

Differs from the paper: every x has norm 1, which needs no bound from the photos; a fixed random projection R [D, P]
(signs of the run's seed; Achlioptas 2003) leaves fewer entries that need noise. Its columns add up to zero: features
after a ReLU share a large mean, which would take up most of the norm. A and B are one release, with w for how noise is
shared between them. The smallest eigenvalue of the noisy A is used as it is: A itself has none below zero, so that it
shows how large the noise is, and costs nothing. c is 1/2, where the paper has a bound that holds with a given
probability. There is no intercept, so that the norm of a photo's features does not change its product; nor a
temperature, as nothing chooses it, so that probabilities are not calibrated.

Shapes: N photos, D features, P projected ones, K classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from fedshelf.algorithms.base import Algorithm, VectorSpec
from fedshelf.algorithms.ridge import GRAM, MOMENTS, Head, Ridge
from fedshelf.core.errors import ModelError, RefusedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fedshelf.algorithms.base import Aggregate, Broadcast, ClientState, ModelState, Tensor, Trainer, Upload
    from fedshelf.core.params import Layout

MOMENTS_WEIGHT = 2.0
"""w: how much less noise the entries of B get than those of A."""
EIGENVALUE_FACTOR = 0.5
"""c."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivateRidge(Algorithm):
    """`Ridge` with noise on the sums of each store. It computes the same in every round, from that round's uploads.

    Attributes:
        exact: the same without noise, which a store computes for itself.
        dimensions: P.
        seed: the run's seed.
        noise_multiplier: sigma, only at a store.
    """

    exact: Ridge
    dimensions: int
    seed: int
    noise_multiplier: float | None = None
    sums: ClassVar[bool] = True
    ignores: ClassVar[tuple[str, ...]] = Ridge.ignores

    def for_model(self, layout: Layout, head: str) -> PrivateRidge:
        return replace(self, exact=self.exact.for_model(layout, head))

    def vectors(self, layout: Layout) -> Mapping[str, VectorSpec]:
        from fedshelf.core.messages import AUXILIARY, DELTA

        size = self._size
        gram, moments = VectorSpec(size * (size + 1) // 2), VectorSpec(size * self._head.num_classes)
        return {DELTA: VectorSpec(0), AUXILIARY + GRAM: gram, AUXILIARY + MOMENTS: moments}

    def client_round(self, broadcast: Broadcast, state: ClientState, trainer: Trainer) -> tuple[Upload, ClientState]:
        from fedshelf.core.messages import DELTA, Upload, auxiliary_vectors

        if self.noise_multiplier is None:
            raise RefusedError("sums over photos are not sent without noise")
        started = time.perf_counter()
        trainer.bound_model.load(broadcast.params)
        sums = self._noisy_sums(trainer.features(trainer.train), trainer.train.labels, self.noise_multiplier)
        upload = Upload(
            key=broadcast.key, vectors={DELTA: broadcast.params.new_zeros(0), **auxiliary_vectors(sums)},
            num_examples=len(trainer.train), num_steps=0, train_loss=None,
            seconds=time.perf_counter() - started,
        )  # fmt: skip
        return upload, state

    def weight(self, upload: Upload, staleness: int) -> float:
        return 1.0  # sums of more photos are larger

    def server_update(self, state: ModelState, aggregate: Aggregate, population: int) -> ModelState:
        import torch

        gram, moments_PK = (aggregate.num_clients * aggregate.auxiliary[name].double() for name in (GRAM, MOMENTS))
        gram_PP = gram.new_zeros(self._size, self._size)
        rows, columns = torch.triu_indices(self._size, self._size)
        gram_PP[rows, columns] = gram
        gram_PP[columns, rows] = gram
        values_P, vectors_PP = torch.linalg.eigh(gram_PP)  # line 5
        scale = EIGENVALUE_FACTOR * max(0.0, -float(values_P[0]))
        if self.exact.ridge_lambda is not None:
            scale = self.exact.ridge_lambda * float(gram_PP.diagonal().mean())
        damped_P = (values_P.clamp(min=0) + scale).clamp(min=1e-9 * float(values_P.abs().max()) or 1.0)
        solved_PK = vectors_PP @ ((vectors_PP.T @ moments_PK.view(self._size, -1)) / damped_P[:, None])
        solution_DK = self._projected(solved_PK, transposed=True)  # line 6
        head_EK = torch.cat([solution_DK, solution_DK.new_zeros(1, self._head.num_classes)])
        return replace(state, params=self._head.put(state.params, head_EK))

    def solve_alone(self, params: Tensor, trainer: Trainer) -> Tensor:
        return self.exact.solve_alone(params, trainer)

    def _noisy_sums(
        self, features_ND: NDArray[np.float32], labels: NDArray[np.int64], noise_multiplier: float
    ) -> dict[str, Tensor]:
        """Lines 1 and 2: A's upper triangle and B, float32."""
        import torch

        from fedshelf.privacy.noise import SecretRandom

        found_NP = self._projected(torch.from_numpy(features_ND).double())
        norms_N1 = torch.linalg.vector_norm(found_NP, dim=1, keepdim=True)
        # A photo without features, or with infinite ones, adds nothing.
        found_NP = torch.where(norms_N1.isfinite() & (norms_N1 > 0), found_NP / norms_N1, 0)
        moments_PK = found_NP.new_zeros(self._size, self._head.num_classes)
        moments_PK.index_add_(1, torch.from_numpy(labels), found_NP.T)
        gram_PP = found_NP.T @ found_NP
        deviation, source = noise_multiplier * math.sqrt(0.5 + MOMENTS_WEIGHT**2), SecretRandom()
        rows, columns = torch.triu_indices(self._size, self._size)
        gram, moments = gram_PP[rows, columns], moments_PK.reshape(-1)
        gram += deviation * source.normal(len(gram)) * torch.where(rows == columns, math.sqrt(2), 1.0)
        moments += deviation / MOMENTS_WEIGHT * source.normal(len(moments))
        return {GRAM: gram.float(), MOMENTS: moments.float()}

    def _projected(self, values: Tensor, *, transposed: bool = False) -> Tensor:
        """`values` [N, D] times R, or R times `values` [P, K]."""
        import torch

        from fedshelf.core.rng import Rng

        size = self._head.num_features
        if self._size == size:
            projection_DP = torch.eye(size, dtype=torch.float64)
        else:
            signs = Rng(self.seed).fork(purpose="projection").torch()
            projection_DP = torch.randint(0, 2, (size, self._size), generator=signs).double() * 2 - 1
        projection_DP -= projection_DP.mean(0)
        return projection_DP @ values if transposed else values @ projection_DP

    @property
    def _size(self) -> int:
        """P, at most D."""
        return min(self.dimensions, self._head.num_features)

    @property
    def _head(self) -> Head:
        if self.exact.head is None:
            raise ModelError("ridge regression is asked for sums before its model is known")
        return self.exact.head
