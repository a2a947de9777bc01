"""Differential privacy for each store by noise of the stores: each adds a share before its upload is masked.

Source: Agarwal, Kairouz, Liu 2021, "The Skellam Mechanism for Differentially Private Federated Learning", theorem 3.5
and corollary 3.6.

    of n members, t open the sum; q has integers with ‖q‖² <= B (`compression.unit_ball`)
     1  V <- the solution of V² / (V + 5/2) = z² B                        z: noise multiplier of a Gaussian
     2  q <- q + Skellam(V / t)                                           in each store, value by value
     3  the sum of t honest stores and any others has noise of variance V or more

Its Rényi divergence at a whole order a >= 2, for one store more or less, where ‖q‖_1 <= ‖q‖² since q is whole:

    D_a <= a B / 2V + ((2a - 1) B + 6 ‖q‖_1) / 4V²  <=  a B / 2V · (1 + 5 / 2V)  =  a / 2z²

That is the divergence of a Gaussian mechanism with noise multiplier z. So releases are accounted for as such, at whole
orders and by Rényi divergences alone (`privacy.epsilon`): distributions of the privacy loss are those of the Gaussian,
and would not do.

With an adaptive clip norm, the sum of ±1/2 that tells how many uploads were not scaled down gets noise in the same way:
it is the `NoisyMean` of `client_dp`, whose two deviations line 1 turns into variances. The expected number of stores is
that of the members.

Differs from the paper: there is no rotation; a share is 1/t of the noise and not 1/n, so that stores may drop out or
reveal their shares of the noise, as long as t honest ones stay. If all n stay, there is n/t of the noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedshelf.compression.unit_ball import IntegerBall
from fedshelf.compression.upload_grid import WIDE_STEP, Integers
from fedshelf.privacy.client_dp import NoisyMean
from fedshelf.privacy.noise import SecretRandom
from fedshelf.privacy.skellam import MAX_VARIANCE, Skellam

MOST_FACTOR = math.sqrt(4 / 3) * math.sqrt(2)
"""The largest deviation of the noise in a sum, as a multiple of the noise multiplier and the norm of integers: that of
an adaptive norm (`NoisyMean.deviations`), and of twice as many members as the threshold."""
MOST_DEVIATION = math.sqrt(MAX_VARIANCE)
_UNIT = 1 << 22
"""The integers that the noise of the count is a multiple of: 1/2 is 2^9 of them."""
_HALF = round(0.5 / WIDE_STEP) // _UNIT


def renyi_divergence(order: int, *, squared_l2: float, l1: float, variance: float) -> float:
    """Theorem 3.5: a bound on the divergence between Skellam noise on two vectors of integers.

    Args:
        order: whole, at least 2.
        squared_l2: squared norm of their difference.
        l1: sum of its magnitudes.
        variance: of the noise.
    """
    second = ((2 * order - 1) * squared_l2 + 6 * l1) / (4 * variance**2)
    return order * squared_l2 / (2 * variance) + min(second, 3 * l1 / (2 * variance))


def variance_for(noise_multiplier: float, squared_norm: float) -> float:
    """Line 1.

    Args:
        noise_multiplier: z.
        squared_norm: B.
    """
    product = noise_multiplier**2 * squared_norm
    return (product + math.sqrt(product * (product + 10))) / 2


@dataclass(frozen=True, slots=True)
class NoiseShares:
    """The noise of the stores.

    Attributes:
        mean: noise multiplier, and whether the norm adapts.
    """

    mean: NoisyMean

    def add(
        self, codes: Sequence[Integers], ball: IntegerBall, *, num_members: int, threshold: int,
        source: SecretRandom | None = None,
    ) -> None:  # fmt: skip
        """Line 2, in place, modulo the integers' sizes. The noise is new each time.

        Args:
            codes: the three vectors of an upload (`compression.upload_grid`). All values are in the first one; the
                last one begins with the count, if the norm adapts.
            ball: the bound on the values.
            num_members: n.
            threshold: t.
            source: random bits; by default those of a new key.
        """
        source = source or SecretRandom()
        of_sum, of_count = self.mean.deviations(num_members)
        values, _, wide = codes
        values += _share(variance_for(of_sum, ball.squared_norm), threshold).draw(len(values), source).astype(
            values.dtype
        )  # fmt: skip
        if self.mean.is_adaptive:
            variance = variance_for(2 * of_count, _HALF**2)
            wide[:1] += (_share(variance, threshold).draw(1, source) * _UNIT).astype(np.uint64)


@lru_cache(maxsize=8)
def _share(variance: float, threshold: int) -> Skellam:
    return Skellam(variance / threshold)
