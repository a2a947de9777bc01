"""Vectors of at most norm 1 as integers on one grid, so that what one of them adds to a sum is bounded exactly.

Source: Kairouz, Liu, Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
Aggregation", section 4.2 (conditional rounding).

    d values, m summands of BITS bits
     1  K <- the largest power of two up to 8 sqrt(d), or 2^10 for small d, for which line 4 holds
     2  B <- K² + d/4 + K + sqrt(d)/2                       bound on ‖q‖²
     3  q <- floor(K x + u), u uniform in [0, 1)^d, until ‖q‖² <= B; after 8 attempts, K x rounded toward zero
     4  m sqrt(B) + x_max < 2^(BITS-1)                      x_max: noise in a sum that is not exceeded but with
                                                            a probability of 2 e^-64

Differs from the paper: there is no rotation before it. The room of line 4 suffices even if all summands point in the
direction of one value, so a sum never wraps; K could be larger if it relied on likely sums. The number of attempts
is limited. Rounding toward zero never makes a norm larger, so the bound holds for every u, also for one that others
know.

With K above 4 sqrt(d), sqrt(B) / K is below 1.01: rounding costs 1 % more noise, and its own error is far below that.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedshelf.compression.modular import Modular
from fedshelf.core.errors import UsageError

ATTEMPTS = 8
"""Draws of u, of which each suffices with a probability of 0.39 or more (Kairouz et al. 2021, with β = e^-1/2)."""
WITHIN = "within"
"""Name of the vector [1] that tells whether an upload was not scaled down: 1/2 or -1/2."""
MOST_INFLATION = 1.1
_FINE, _FIRST_LEVELS = 8.0, 1 << 10
_LOG_TAIL = 64.0


@dataclass(frozen=True, kw_only=True, slots=True)
class IntegerBall:
    """The integers of a vector of at most norm 1.

    Attributes:
        levels: K.
        squared_norm: B.
    """

    levels: int
    squared_norm: float

    @classmethod
    def of(cls, size: int, levels: int) -> "IntegerBall":
        """Line 2.

        Args:
            size: d.
            levels: K.
        """
        return cls(levels=levels, squared_norm=levels**2 + size / 4 + levels + math.sqrt(size) / 2)

    @property
    def inflation(self) -> float:
        """By how much rounding may lengthen a vector of norm 1: sqrt(B) / K."""
        return math.sqrt(self.squared_norm) / self.levels

    def contains(self, codes: NDArray[np.signedinteger]) -> bool:
        """Whether the norm of integers is within the bound."""
        values = codes.astype(np.float64)
        return float(values @ values) <= self.squared_norm

    def toward_zero(self, vector: torch.Tensor) -> torch.Tensor:
        """The values, rounded toward zero to multiples of 1 / K, in float64, in which this is exact."""
        return (vector.double() * self.levels).trunc_() / self.levels


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitBall:
    """How uploads of bounded norm are encoded.

    Attributes:
        has_within: whether uploads tell if they were scaled down (`WITHIN`).
        noise: returns the largest deviation of the noise in a sum of integers, as a multiple of sqrt(B).
        most_deviation: of the noise in a sum, in integers.
    """

    has_within: bool = False
    noise: Callable[[], float] = lambda: 0.0
    most_deviation: float = math.inf

    def integers(self, codec: Modular, size: int) -> IntegerBall:
        """Line 1.

        Args:
            codec: BITS and SUMMANDS.
            size: d.

        Raises:
            UsageError: there is no room for integers so large that rounding does not matter.
        """
        noise, levels = self.noise(), max(_FIRST_LEVELS, 1 << math.floor(math.log2(_FINE * math.sqrt(size))))
        ball = IntegerBall.of(size, levels)
        while ball.inflation <= MOST_INFLATION:
            norm = math.sqrt(ball.squared_norm)
            has_room = codec.summands * norm + _tail(noise * norm) < 2 ** (codec.bits - 1)
            if has_room and noise * norm <= self.most_deviation:
                return ball
            ball = IntegerBall.of(size, ball.levels // 2)
        raise UsageError(
            f"{codec.text} has no room for the sum of {codec.summands} updates of {size:,} values"
            + (f" with noise of {noise:.3g} times their norm" if noise else "")
            + f": use --codec-up modular:{codec.bits}:0:SUMMANDS with fewer summands"
            + ("" if codec.bits == 32 else ", or modular:32")
        )


def _tail(deviation: float) -> float:
    """x_max for Skellam noise, by Bernstein's inequality; 5 is the variance that small norms need in addition."""
    if not deviation:
        return 0.0
    return _LOG_TAIL / 3 + math.hypot(_LOG_TAIL / 3, math.sqrt(2 * _LOG_TAIL * (deviation**2 + 5)))
