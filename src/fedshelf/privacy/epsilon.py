"""ε of composed Gaussian mechanisms on Poisson samples, by two methods.

    PLD    compose distributions of the privacy loss:       Koskela et al. 2020, "Computing Tight Differential Privacy
           tight but for its grid                           Guarantees Using FFT"; Doroshenko et al. 2022
    RDP    add Rényi divergences: looser, without a grid    Mironov et al. 2019, "Rényi Differential Privacy of the
                                                            Sampled Gaussian Mechanism"

Both give upper bounds, and both come from the package `dp-accounting`. Differs from it: rounding errors, which grow
with the steps, count as a cost (`_PLD_ERROR`, `_RDP_ERROR`). Without that, results can fall below the true ε when steps
are many and δ is small. The grid of PLD is as fine as a step's losses need, and as coarse as the total allows.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, TypeAlias

from fedshelf.core.errors import UsageError
from fedshelf.core.text import counted

Groups: TypeAlias = Mapping[tuple[float, float], int]
"""Steps by noise multiplier and sampling rate."""

MAX_EPSILON = 500.0
"""Largest ε that is computed by PLD: above it, exponentials of losses overflow."""

_LEAST_NOISE = 1e-4  # float32 values hardly have noise below that, and divergences overflow
_MAX_PLD_STEPS = 10**6
_MAX_GROUPS = 32  # PLD composes them one by one
_MAX_BINS = 2**18  # of a distribution
_COARSE = 1.05
_RDP_ERROR = 1e-14  # rounding error of a step's divergence, divided by order and sampling rate; 4e-15 was measured
_PLD_ERROR = 1e-15  # rounding error of δ for each step; 2e-17 was measured


def epsilons(
    groups: Groups, delta: float, *, is_discrete: bool = False
) -> tuple[float | None, float, tuple[str, ...]]:  # fmt: skip
    """Compute ε of all steps together.

    Args:
        groups: the steps. Their order has no effect but on the last bits.
        delta: δ, between 0 and 1.
        is_discrete: see `renyi`. Distributions of the privacy loss do not apply then.

    Returns:
        ε by PLD, or None where that does not apply; ε by RDP; and what limits the results, in sentences.

    Raises:
        UsageError: `dp-accounting` is not installed.
    """
    groups = {(noise, rate): steps for (noise, rate), steps in groups.items() if rate > 0}
    if not groups:
        return 0.0, 0.0, ()
    if any(noise < _LEAST_NOISE for noise, _ in groups):
        return math.inf, math.inf, ("A release has next to no noise, so nothing is guaranteed.",)
    limits: tuple[str, ...] = ()
    if len(groups) > _MAX_GROUPS:
        limits = (
            f"Of {len(groups)} different settings, noise is rounded down and sampling rates are rounded up, by at most "
            "5 %. This makes ε a little larger.",
        )
        groups = _coarser(groups)
    groups = _with_one_gaussian(groups)
    steps = sum(groups.values())
    rdp = renyi(groups, delta, is_discrete=is_discrete)
    largest_loss = max(_loss(noise, rate) for noise, rate in groups)
    spare_delta = delta - _PLD_ERROR * (steps + 100)
    if is_discrete:
        why = "the noise consists of integers, of which Rényi divergences are known"
    elif max(rdp, largest_loss) > MAX_EPSILON:
        why = f"ε is above {MAX_EPSILON:g}"
    elif len(groups) > _MAX_GROUPS:
        why = f"there are {len(groups)} different settings"
    elif steps > _MAX_PLD_STEPS or spare_delta <= 0:
        why = f"its precision does not suffice for {counted(steps, 'step')} at δ = {delta:g}"
    else:
        per_step = min(rate * min(1.0, 1 / noise) for noise, rate in groups)
        interval = max(min(2**-10, per_step / 30), 4 * (rdp + largest_loss) / _MAX_BINS)
        return _pld(groups, 2.0 ** math.ceil(math.log2(interval)), spare_delta), rdp, limits
    return None, rdp, (*limits, f"ε is computed by RDP alone. PLD is not used because {why}.")


def _coarser(groups: Groups) -> Groups:
    """Round noise down and sampling rates up, to powers of 1.05, so that ε can only increase."""
    coarser: Counter[tuple[float, float]] = Counter()
    for (noise, rate), steps in groups.items():
        less_noise = min(noise, _COARSE ** math.floor(math.log(noise, _COARSE)))
        larger_rate = max(rate, _COARSE ** math.ceil(math.log(rate, _COARSE)))
        coarser[less_noise, min(larger_rate, 1.0)] += steps
    return dict(sorted(coarser.items()))


def _with_one_gaussian(groups: Groups) -> Groups:
    """Replace steps over everything by one: Dong et al. 2022, "Gaussian Differential Privacy", corollary 3.3."""
    precision = math.fsum(steps / noise**2 for (noise, rate), steps in groups.items() if rate == 1)
    sampled = {group: steps for group, steps in groups.items() if group[1] < 1}
    return sampled | ({(precision**-0.5, 1.0): 1} if precision else {})


def _loss(noise: float, rate: float) -> float:
    """The largest privacy loss of a step, but for a probability of e^-50."""
    largest = (0.5 / noise + 10) / noise
    return math.log1p(rate * math.expm1(largest)) if largest < 700 else math.inf


def renyi(groups: Groups, delta: float, *, is_discrete: bool = False) -> float:
    """ε by Rényi divergences alone, which takes milliseconds (see `epsilons`).

    Args:
        groups: the steps.
        delta: δ, between 0 and 1.
        is_discrete: whether the divergences are known for whole orders only (`distributed_dp`).
    """
    _, rdp = _dp_accounting()
    orders = rdp.RdpAccountant()._orders
    steps = ((count, rate, _rdp_of_step(noise, rate)) for (noise, rate), count in groups.items())
    total = sum(count * (divergences + orders * rate * _RDP_ERROR) for count, rate, divergences in steps)
    known = (orders % 1 == 0) & (orders >= 2) if is_discrete else orders > 1
    epsilon, _ = rdp.compute_epsilon(orders[known], total[known], delta)
    return float(epsilon)


@lru_cache(maxsize=256)
def _rdp_of_step(noise: float, rate: float) -> Any:
    """The Rényi divergence of a step at each order."""
    events, rdp = _dp_accounting()
    accountant = rdp.RdpAccountant()
    accountant.compose(events.PoissonSampledDpEvent(rate, events.GaussianDpEvent(noise)))
    return accountant._rdp


def _pld(groups: Groups, interval: float, delta: float) -> float:
    composed, *others = (_pld_of_steps(noise, rate, steps, interval) for (noise, rate), steps in groups.items())
    for other in others:
        composed = composed.compose(other)
    return float(composed.get_epsilon_for_delta(delta))


@lru_cache(maxsize=_MAX_GROUPS)
def _pld_of_steps(noise: float, rate: float, steps: int, interval: float) -> Any:
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    step = from_gaussian_mechanism(noise, sampling_prob=rate, value_discretization_interval=interval)
    return step.self_compose(steps)


@cache
def _dp_accounting() -> tuple[ModuleType, ModuleType]:
    """Import the package, which takes a second, and its part for RDP."""
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError:
        raise UsageError(
            "differential privacy needs the package dp-accounting, which is an extra: pip install 'fedshelf[dp]'"
        ) from None
    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of each order that RDP leaves out, which is harmless
    return dp_accounting, rdp
