"""Accounting of differential privacy: which ε a list of releases gives.

A release is information that was computed from one photo set (or one client's data) with Gaussian noise: some steps of
DP-SGD, whose batches are Poisson samples, or a noisy sum of everything. Its parameters have a plain JSON form, so that a
ledger keeps them, and the total is computed from the ledger each time.

    groups = equal releases, merged                   order and grouping do not affect the result
    PLD    = composed privacy loss distributions      tight: Koskela et al. 2020; Doroshenko et al. 2022
    RDP    = composed Rényi divergences               an independent upper bound: Mironov et al. 2019

Both are upper bounds of ε; `Guarantee.epsilon` is the smaller one. The computation is that of the package
`dp-accounting`, with what that lacks: its results can fall below the true ε where steps are many and δ is small, because
rounding errors grow with the steps. `_RDP_ERROR` and `_PLD_ERROR` bound these errors and are added to the cost.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, Literal

from fedshelf.core.errors import BudgetError, UsageError
from fedshelf.core.text import counted

Unit = Literal["photo", "client"]

MAX_NOISE, MAX_STEPS, MAX_EPSILON = 1e6, 10**9, 500.0

_MECHANISM = "sampled-gaussian"
_BOUNDS: Mapping[str, tuple[float, float]] = {
    "noise_multiplier": (0, MAX_NOISE), "sampling_rate": (0, 1), "steps": (1, MAX_STEPS),
}  # fmt: skip
_MAX_PLD_STEPS = 10**6
_MAX_GROUPS = 50  # different settings, which PLD composes one by one
_MAX_BINS = 2**18  # of a distribution of privacy losses
_RDP_ERROR = 1e-12  # rounding error of a step's divergence, times the order
_PLD_ERROR = 1e-15  # rounding error of δ per step; measured: 2e-17
_TOLERANCE = 1.001  # of a calibrated noise multiplier


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledGaussian:
    """A release: sums over Poisson samples, each with Gaussian noise.

    Attributes:
        noise_multiplier: standard deviation of the noise, divided by the most that one photo (or client) adds to the
            sum, which is the clip norm; 0 is no noise.
        sampling_rate: probability with which each photo (or client) takes part in a step, independently of the others.
            1 is a plain Gaussian mechanism, over everything.
        steps: sums that were released, each with noise of its own.
    """

    noise_multiplier: float
    sampling_rate: float = 1.0
    steps: int = 1

    def __post_init__(self) -> None:
        problems = [
            problem
            for field in fields(self)
            if (problem := _problem(field.name, getattr(self, field.name), *_BOUNDS[field.name]))
        ]
        if problems:
            raise UsageError(*problems)

    def to_json(self) -> dict[str, Any]:
        """Return the release as plain values."""
        return {"mechanism": _MECHANISM, **asdict(self)}

    @classmethod
    def from_json(cls, value: object) -> SampledGaussian:
        """Restore a release from the plain values of `to_json`.

        Args:
            value: parsed JSON from any source.

        Raises:
            UsageError: it is not a release; the problems say why.
        """
        names = ["mechanism", *_BOUNDS]
        if not isinstance(value, Mapping) or sorted(map(str, value)) != sorted(names):
            raise UsageError(f"a release has the keys {', '.join(names)}, and no others")
        if value["mechanism"] != _MECHANISM:
            raise UsageError(f"unknown mechanism: this version knows only '{_MECHANISM}'")
        return cls(**{name: value[name] for name in _BOUNDS})


@dataclass(frozen=True, kw_only=True, slots=True)
class Guarantee:
    """What a list of releases guarantees together.

    Attributes:
        pld: ε by privacy loss distributions; None where it cannot be computed, which `assumptions` explains. Infinite
            if a release has no noise.
        rdp: ε by Rényi divergences.
        delta: δ, for which ε holds.
        unit: what is protected: one photo, or one client with all its data.
        neighboring_relation: how the data differ between which ε bounds the difference.
        sampling: what the sampling of batches has to be.
        num_releases: number of releases.
        releases: the releases, with equal ones merged.
        assumptions: what has to hold for the guarantee, in sentences.
    """

    pld: float | None
    rdp: float
    delta: float
    unit: Unit
    neighboring_relation: Literal["add-or-remove-one"] = "add-or-remove-one"
    sampling: Literal["poisson", "none"]
    num_releases: int
    releases: tuple[SampledGaussian, ...]
    assumptions: tuple[str, ...]

    @property
    def epsilon(self) -> float:
        """The smaller bound."""
        return self.rdp if self.pld is None else min(self.pld, self.rdp)

    def to_json(self) -> dict[str, Any]:
        """Return the guarantee as plain values. An infinite ε stays infinite."""
        return {"epsilon": self.epsilon, **asdict(self), "releases": [one.to_json() for one in self.releases]}


def compose(releases: Iterable[SampledGaussian], delta: float, *, unit: Unit = "photo") -> Guarantee:
    """Compute the ε of releases from the same data. Their order and the grouping of equal steps have no effect.

    Args:
        releases: the releases; none give ε = 0.
        delta: δ, between 0 and 1.
        unit: what the releases' clip norm and sampling rate refer to.

    Returns:
        The guarantee.

    Raises:
        UsageError: δ is not between 0 and 1, or `dp-accounting` is not installed.
    """
    if problem := _problem("delta", delta, 0, 1, exclusive=True):
        raise UsageError(problem)
    releases = list(releases)
    merged = _merged(releases)
    pld, rdp, limits = _epsilons(merged, delta)
    return Guarantee(
        pld=pld, rdp=rdp, delta=delta, unit=unit, num_releases=len(releases), releases=merged,
        sampling="poisson" if any(one.sampling_rate < 1 for one in merged) else "none",
        assumptions=(*_assumptions(merged, delta, unit), *limits),
    )  # fmt: skip


def noise_multiplier_for(
    target_epsilon: float,
    delta: float,
    *,
    sampling_rate: float = 1.0,
    steps: int = 1,
    before: Sequence[SampledGaussian] = (),
) -> float:
    """Find the smallest noise multiplier (to 0.1 %) with which ε stays within a target.

    Args:
        target_epsilon: the most that ε may be in the end.
        delta: δ, between 0 and 1.
        sampling_rate: sampling rate of the steps to come.
        steps: steps to come, in all releases together.
        before: releases made already, which count toward the target.

    Returns:
        The noise multiplier.

    Raises:
        BudgetError: the releases made already leave nothing of the target, or no noise is enough.
        UsageError: an argument is out of bounds, or `dp-accounting` is not installed.
    """
    if problem := _problem("target epsilon", target_epsilon, 0, MAX_EPSILON, exclusive=True):
        raise UsageError(problem)
    spent = compose(before, delta).epsilon
    if spent >= target_epsilon:
        raise BudgetError(
            f"{counted(len(before), 'release')} have spent an ε of {spent:.4g}, which leaves nothing of the ε of "
            f"{target_epsilon:g} that is allowed"
        )

    def fits(noise: float) -> bool:
        new = SampledGaussian(noise_multiplier=noise, sampling_rate=sampling_rate, steps=steps)
        return compose([*before, new], delta).epsilon <= target_epsilon

    low = high = 1.0
    while not fits(high):
        low, high = high, high * 2
        if high > MAX_NOISE:
            raise BudgetError(
                f"no noise multiplier up to {MAX_NOISE:,.0f} keeps {counted(steps, 'step')} within an ε of "
                f"{target_epsilon:g} at δ = {delta:g}: allow a larger ε, or plan fewer steps"
            )
    while low == high or (low > 1 / MAX_NOISE and fits(low)):
        low, high = low / 2, low
    while high > low * _TOLERANCE:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _problem(name: str, value: object, low: float, high: float, *, exclusive: bool = False) -> str:
    """What is wrong with a number from outside; empty if nothing is."""
    kinds, kind = (int, "whole number") if name == "steps" else (int | float, "number")
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if is_number and (low < value < high if exclusive else low <= value <= high):
        return ""
    shown = f" {value}" if is_number and len(str(value)) < 30 else ""
    bounds = f"between {low:g} and {high:g}" if exclusive else f"from {low:g} to {high:,.0f}"
    return f"{name.replace('_', ' ')}{shown}: must be a {kind} {bounds}"


def _merged(releases: Iterable[SampledGaussian]) -> tuple[SampledGaussian, ...]:
    """Merge releases of equal noise and sampling rate, and sort them."""
    steps: Counter[tuple[float, float]] = Counter()
    for one in releases:
        steps[float(one.noise_multiplier), float(one.sampling_rate)] += one.steps
    return tuple(
        SampledGaussian(noise_multiplier=noise, sampling_rate=rate, steps=number)
        for (noise, rate), number in sorted(steps.items())
    )


def _coarser(one: SampledGaussian) -> SampledGaussian:
    """Round to steps of 5 %: the noise down and the sampling rate up, so that ε can only increase."""
    noise = 1.05 ** math.floor(math.log(one.noise_multiplier, 1.05))
    rate = 1.05 ** math.ceil(math.log(one.sampling_rate, 1.05))
    return SampledGaussian(
        noise_multiplier=min(noise, one.noise_multiplier),
        sampling_rate=min(max(rate, one.sampling_rate), 1.0),
        steps=one.steps,
    )


def _epsilons(releases: Sequence[SampledGaussian], delta: float) -> tuple[float | None, float, tuple[str, ...]]:
    """Return ε by PLD and by RDP, and what limits them, in sentences."""
    informative = [one for one in releases if one.sampling_rate > 0]
    if not informative:
        return 0.0, 0.0, ()
    if any(one.noise_multiplier == 0 for one in informative):
        return math.inf, math.inf, ("A release has no noise, so nothing is guaranteed.",)
    limits: tuple[str, ...] = ()
    if len(informative) > _MAX_GROUPS:
        limits = (
            f"Of {len(informative)} different settings, noise is rounded down and sampling rates are rounded up, by at "
            "most 5 %. ε is a little larger for that.",
        )
        informative = list(_merged(map(_coarser, informative)))
    groups = {(one.noise_multiplier, one.sampling_rate): one.steps for one in informative if one.sampling_rate < 1}
    # Gaussian mechanisms compose to one: Dong et al. 2022, "Gaussian Differential Privacy", corollary 3.3
    if precision := math.fsum(one.steps / one.noise_multiplier**2 for one in informative if one.sampling_rate == 1):
        groups[precision**-0.5, 1.0] = 1
    steps = sum(groups.values())
    rdp = _rdp(groups, delta)
    largest_loss = max(_loss(noise, rate) for noise, rate in groups)
    spare_delta = delta - _PLD_ERROR * (steps + 100)
    if max(rdp, largest_loss) > MAX_EPSILON:
        why = f"ε is above {MAX_EPSILON:g}"
    elif len(groups) > _MAX_GROUPS:
        why = f"there are {len(groups)} different settings"
    elif steps > _MAX_PLD_STEPS or spare_delta <= 0:
        why = f"its precision does not suffice for {counted(steps, 'step')} at δ = {delta:g}"
    else:
        per_step = min(rate * min(1.0, 1 / noise) for noise, rate in groups)
        interval = max(min(2**-10, per_step / 30), 4 * (rdp + largest_loss) / _MAX_BINS)
        pld = _pld(groups, 2.0 ** math.ceil(math.log2(interval))).get_epsilon_for_delta(spare_delta)
        if math.isfinite(pld):
            return float(pld), rdp, limits
        why = f"its precision does not suffice for δ = {delta:g}"
    return None, rdp, (*limits, f"ε is computed by RDP alone. PLD is not used because {why}.")


def _loss(noise: float, rate: float) -> float:
    """A bound on the privacy loss of a step that holds but for a probability of e^-50."""
    largest = (0.5 / noise + 10) / noise
    return math.log1p(rate * math.expm1(largest)) if largest < 700 else math.inf


def _rdp(groups: Mapping[tuple[float, float], int], delta: float) -> float:
    _, rdp = _dp_accounting()
    accountant = rdp.RdpAccountant()
    orders = accountant._orders
    total = orders * _RDP_ERROR * sum(groups.values())
    for (noise, rate), steps in groups.items():
        total = total + steps * _rdp_of_step(noise, rate)
    epsilon, _ = rdp.compute_epsilon(orders, total, delta)
    return float(epsilon)


@lru_cache(maxsize=256)
def _rdp_of_step(noise: float, rate: float) -> Any:
    """The Rényi divergence of a step at each order."""
    events, rdp = _dp_accounting()
    accountant = rdp.RdpAccountant()
    accountant.compose(events.PoissonSampledDpEvent(rate, events.GaussianDpEvent(noise)))
    return accountant._rdp


def _pld(groups: Mapping[tuple[float, float], int], interval: float) -> Any:
    """The privacy loss distribution of all steps, on a grid of the given interval."""
    first, *others = (_pld_of_steps(noise, rate, steps, interval) for (noise, rate), steps in groups.items())
    for other in others:
        first = first.compose(other)
    return first


@lru_cache(maxsize=16)
def _pld_of_steps(noise: float, rate: float, steps: int, interval: float) -> Any:
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(
        standard_deviation=noise, sampling_prob=rate, value_discretization_interval=interval
    ).self_compose(steps)


@cache
def _dp_accounting() -> tuple[ModuleType, ModuleType]:
    """Import the library, which takes a second, and its part for RDP."""
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError:
        raise UsageError(
            "differential privacy needs the package dp-accounting, which is an extra: pip install 'fedshelf[dp]'"
        ) from None
    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of each order that RDP leaves out, which is harmless
    return dp_accounting, rdp


def _assumptions(releases: Sequence[SampledGaussian], delta: float, unit: Unit) -> tuple[str, ...]:
    what, part = ("one photo", "photo") if unit == "photo" else ("one store with all its photos", "store")
    sentences = [
        f"The unit of protection is {what}: ε compares the data with and without it (add or remove one).",
        f"Each {part}'s contribution is clipped, and the noise multiplier is the noise's standard deviation divided by "
        "the clip norm.",
        "The noise is new for each step, normally distributed, and cannot be predicted or learned by anyone.",
        "Only the listed releases are covered. Whatever else leaves the store needs a protection of its own.",
    ]
    if any(one.sampling_rate < 1 for one in releases):
        sentences.insert(
            2,
            f"Batches are Poisson samples: each {part} is drawn independently with the sampling rate, and nobody learns "
            f"which or how many {part}s were drawn.",
        )
    return (*sentences, f"The bound may fail with a probability of about δ = {delta:g}.")
