"""A lower bound on ε from guesses in one run: Steinke et al. 2023, "Privacy Auditing with One (1) Training Run".

Each of m canaries is put in or left out by a fair coin. An attacker who has seen the result guesses for r of them, and
is right for v. Under (ε, δ)-differential privacy, the number of right guesses is at most about that of r coins that
fall right with probability q = e^ε / (1 + e^ε) (Theorem 5.2, as in the code of its appendix D):

    1  β <- P[Binomial(r, q) >= v]
    2  α <- max over i = 1..v of P[v > Binomial(r, q) >= v - i] / i
    3  p <- β + 2 m δ α
    4  ε is refuted with confidence 1 - p

The bound is the largest ε that is refuted. Its ceiling is the bound if all guesses are right: no attack, however good,
can show more with so many canaries.

Differs from the paper: the number of guesses is the best of some that are fixed in advance, at the price of dividing
1 - confidence by their number.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

CONFIDENCE = 0.95
_SHARES = (1.0, 0.5, 0.25, 0.125)  # of the canaries that are guessed
_MAX_EPSILON = 50.0
_BISECTIONS = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class EmpiricalEpsilon:
    """What the guesses of one run show.

    Attributes:
        epsilon: the lower bound on ε.
        ceiling: the bound if all guesses were right.
        num_canaries: m.
        num_guesses: r, of the bound.
        num_right: v, of the bound.
        num_right_of_all: right guesses if each canary is guessed.
        interval: of the share of right guesses for all canaries, with `confidence`.
        delta: δ, for which the bound holds.
        confidence: of the bound.
    """

    epsilon: float
    ceiling: float
    num_canaries: int
    num_guesses: int
    num_right: int
    num_right_of_all: int
    interval: tuple[float, float]
    delta: float
    confidence: float = CONFIDENCE


def empirical_epsilon(scores: Sequence[float], is_in: Sequence[bool], *, delta: float) -> EmpiricalEpsilon:
    """Guess from scores, and compute the bound.

    Args:
        scores: by canary; larger ones speak for its being in.
        is_in: by canary, whether it was in, by a fair coin of its own.
        delta: δ.

    Returns:
        The largest of the bounds for different numbers of guesses: half of them `in`, for the largest scores, and half
        `out`, for the smallest.
    """
    count, failure = len(scores), (1 - CONFIDENCE) / len(_SHARES)
    order = sorted(range(count), key=lambda index: scores[index])
    found, ceiling = list[tuple[float, int, int]](), 0.0
    for half in dict.fromkeys(max(1, int(share * count / 2)) for share in _SHARES if count > 1):
        right = sum(is_in[index] for index in order[-half:]) + sum(not is_in[index] for index in order[:half])
        found.append((lower_bound(count, 2 * half, right, delta, failure), 2 * half, right))
        ceiling = max(ceiling, lower_bound(count, 2 * half, 2 * half, delta, failure))
    best = max(found, default=(0.0, 0, 0))
    of_all = found[0][2] if found else 0
    return EmpiricalEpsilon(
        epsilon=best[0], ceiling=ceiling, num_canaries=count, num_guesses=best[1], num_right=best[2],
        num_right_of_all=of_all, interval=confidence_interval(of_all, found[0][1] if found else 0), delta=delta,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def lower_bound(num_canaries: int, num_guesses: int, num_right: int, delta: float, failure: float) -> float:
    """The largest ε that is refuted with confidence 1 - `failure`; 0 if none is."""
    return _crossing(
        lambda epsilon: _p_value(num_canaries, num_guesses, num_right, epsilon, delta) <= failure, 0.0, _MAX_EPSILON
    )


def _p_value(num_canaries: int, num_guesses: int, num_right: int, epsilon: float, delta: float) -> float:
    """Lines 1 to 3."""
    rate = 1 / (1 + math.exp(-epsilon))
    beta = math.fsum(_probability(num_guesses, k, rate) for k in range(num_right, num_guesses + 1))
    alpha = total = 0.0
    for i in range(1, num_right + 1):
        total += _probability(num_guesses, num_right - i, rate)
        alpha = max(alpha, total / i)
    return min(1.0, beta + 2 * num_canaries * delta * alpha)


def confidence_interval(num_right: int, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The interval of a share: Clopper & Pearson 1934."""
    if not count:
        return 0.0, 1.0
    half = (1 - confidence) / 2

    def at_least(rate: float) -> float:
        return math.fsum(_probability(count, k, rate) for k in range(num_right, count + 1))

    def at_most(rate: float) -> float:
        return math.fsum(_probability(count, k, rate) for k in range(num_right + 1))

    low = _crossing(lambda rate: at_least(rate) <= half, 0.0, 1.0) if num_right else 0.0
    high = 1 - _crossing(lambda rate: at_most(1 - rate) <= half, 0.0, 1.0) if num_right < count else 1.0
    return low, high


def _crossing(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The largest argument for which `holds`, which is true below it and false above; `low` if it never is."""
    if not holds(low):
        return low
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _probability(count: int, successes: int, rate: float) -> float:
    """P[Binomial(count, rate) = successes]."""
    if rate in (0.0, 1.0):
        return float(successes == rate * count)
    logarithm = math.lgamma(count + 1) - math.lgamma(successes + 1) - math.lgamma(count - successes + 1)
    return math.exp(logarithm + successes * math.log(rate) + (count - successes) * math.log1p(-rate))
