"""Integers of a Skellam distribution with mean 0: the difference of two Poisson variables of the same mean V / 2.

Source: Skellam 1946, "The Frequency Distribution of the Difference Between Two Poisson Variates Belonging to Different
Populations": P(X = k) = e^-V I_k(V), V the variance, I the modified Bessel function. A sum of independent variables of
variances V and W has the same distribution with variance V + W.

    table, once for a variance:
     1  r_k <- 1 / (2 (k + 1) / V + r_(k+1))         I_(k+1) / I_k, downward from where the tail is below 2^-64
     2  p_k <- p_0 r_0 … r_(k-1), with p_0 + 2 sum_k p_k = 1
     3  c_k <- sum_(j <= k) round(2^63 P(|X| = j)), c_n = 2^63             as integers
    draw:
     4  u <- 63 random bits, s <- 1 bit
     5  k <- the smallest with c_k > u                                      a guide table finds it in one step, mostly
     6  return -k if s else k

Line 1 is Miller's algorithm (Abramowitz and Stegun 1964, 9.12): downward, the recurrence is stable. Each value is drawn
with its probability up to a relative error of about 1e-12, or 2^-63 where that is more.
"""

import math

import numpy as np
from numpy.typing import NDArray

from fedshelf.privacy.noise import SecretRandom

MAX_VARIANCE = 2.0**40
"""For which the table has ten million values."""
_WHOLE = 1 << 63
_LOG_TAIL = 46.0  # the tail beyond the table has a probability below e^-46 < 2^-64
_CHUNK = 1 << 15  # values that are drawn at once, in the processor's cache


def largest(variance: float, log_tail: float = _LOG_TAIL) -> float:
    """A magnitude that is exceeded with a probability of at most 2 e^-log_tail.

    Args:
        variance: V.
        log_tail: negative logarithm of the probability for one side.

    Source: Bernstein's inequality, P(X >= x) <= exp(-x² / (2 (V + x / 3))), which holds since
        ln E e^(tX) = V (cosh t - 1) <= V t² / (2 (1 - t / 3)).
    """
    return log_tail / 3 + math.sqrt(log_tail**2 / 9 + 2 * variance * log_tail)


class Skellam:
    """The distribution of one variance, with its table.

    Args:
        variance: V.

    Raises:
        ValueError: the variance is not above 0 and at most `MAX_VARIANCE`.
    """

    def __init__(self, variance: float) -> None:
        if not 0 < variance <= MAX_VARIANCE:
            raise ValueError(f"a variance of {variance:g} is not above 0 and at most {MAX_VARIANCE:g}")
        size = math.ceil(largest(variance)) + 1
        log_ratios = np.log(_ratios(variance, size))
        log_p = np.concatenate([[0.0], np.cumsum(log_ratios)])  # line 2, relative to p_0
        twice = 2 * np.exp(log_p[1:])
        p_0 = 1 / (1 + math.fsum(twice.tolist()))
        codes = np.rint(twice * p_0 * float(_WHOLE)).astype(np.uint64)
        sums = np.cumsum(np.concatenate([np.zeros(1, np.uint64), codes]))
        self._sums = sums + np.uint64(_WHOLE - int(sums[-1]))  # line 3
        bits = min(18, size.bit_length())
        self._shift = np.uint64(63 - bits)
        starts = np.arange(1 << bits, dtype=np.uint64) << self._shift
        self._guide = np.searchsorted(self._sums, starts, side="right").astype(np.uint32)

    def draw(self, count: int, source: SecretRandom) -> NDArray[np.int64]:
        """Draw `count` values from random bits of `source`."""
        found = np.empty(count, np.int64)
        for start in range(0, count, _CHUNK):
            words = source.random_raw(min(_CHUNK, count - start))
            u = words >> np.uint64(1)  # line 4
            k = self._guide[u >> self._shift]
            late = np.flatnonzero(self._sums[k] <= u)
            k[late] = np.searchsorted(self._sums, u[late], side="right")  # line 5
            signs = 1 - 2 * (words & np.uint64(1)).astype(np.int64)
            np.multiply(k, signs, out=found[start : start + _CHUNK])  # line 6
        return found


def _ratios(variance: float, size: int) -> NDArray[np.float64]:
    """Line 1: r_0 to r_(size - 1)."""
    found = [0.0] * size
    # Amos 1974: within a relative error of 1 / V of the ratio, and better for large k
    ratio = variance / (size + 0.5 + math.hypot(size + 1.5, variance))
    for k in range(size - 1, -1, -1):
        found[k] = ratio = 1 / (2 * (k + 1) / variance + ratio)
    return np.array(found)
