"""Accounting of differential privacy: which ε a list of releases gives.

A release is information that was computed from one photo set (or from all clients) with Gaussian noise: steps of
DP-SGD, whose batches are Poisson samples, or a noisy sum over everything. Its parameters have a plain JSON form, which
a ledger keeps, and the total is computed from all of them each time (`privacy.epsilon`). Equal releases are merged
first: order and grouping do not affect the result.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from fedshelf.core.errors import BudgetError, UsageError
from fedshelf.core.text import counted
from fedshelf.privacy.epsilon import MAX_EPSILON, epsilons

if TYPE_CHECKING:  # torch is not needed to compute ε
    from fedshelf.core.messages import Mechanism

Unit = Literal["photo", "client"]

MAX_NOISE, MAX_STEPS = 1e6, 10**9

_MECHANISM = "sampled-gaussian"
_BOUNDS: Mapping[str, tuple[float, float]] = {
    "noise_multiplier": (0, MAX_NOISE), "sampling_rate": (0, 1), "steps": (1, MAX_STEPS),
}  # fmt: skip
_TOLERANCE = 1.001  # of a calibrated noise multiplier
_NORMAL = "The noise is new for each step, normally distributed, and cannot be predicted or learned by anyone."
_SHARED = (
    "The noise is new for each step, and consists of a share of each store, with a Skellam distribution. At least as "
    "many stores as the threshold of secure aggregation stay in each round, add their share, and tell nobody."
)


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


def compose(
    releases: Iterable[SampledGaussian], delta: float, *, unit: Unit = "photo", is_discrete: bool = False
) -> Guarantee:  # fmt: skip
    """Compute the ε of releases from the same data. Their order and the grouping of equal steps have no effect.

    Args:
        releases: the releases; none give ε = 0.
        delta: δ, between 0 and 1.
        unit: what the releases' clip norm and sampling rate refer to.
        is_discrete: whether the noise is that of the stores together, in integers (`distributed_dp`).

    Returns:
        The guarantee.

    Raises:
        UsageError: δ is not between 0 and 1, or `dp-accounting` is not installed.
    """
    if problem := _problem("delta", delta, 0, 1, exclusive=True):
        raise UsageError(problem)
    releases = list(releases)
    groups: Counter[tuple[float, float]] = Counter()
    for one in releases:
        groups[float(one.noise_multiplier), float(one.sampling_rate)] += one.steps
    merged = tuple(
        SampledGaussian(noise_multiplier=noise, sampling_rate=rate, steps=steps)
        for (noise, rate), steps in sorted(groups.items())
    )
    pld, rdp, limits = epsilons(dict(sorted(groups.items())), delta, is_discrete=is_discrete)
    return Guarantee(
        pld=pld, rdp=rdp, delta=delta, unit=unit, num_releases=len(releases), releases=merged,
        sampling="poisson" if any(one.sampling_rate < 1 for one in merged) else "none",
        assumptions=(*_assumptions(merged, delta, unit, is_discrete=is_discrete), *limits),
    )  # fmt: skip


def noise_multiplier_for(
    target_epsilon: float,
    delta: float,
    *,
    sampling_rate: float = 1.0,
    steps: int = 1,
    before: Sequence[SampledGaussian] = (),
    is_discrete: bool = False,
) -> float:
    """Find the smallest noise multiplier (to 0.1 %) with which ε stays within a target.

    Args:
        target_epsilon: the most that ε may be in the end.
        delta: δ, between 0 and 1.
        sampling_rate: sampling rate of the steps to come.
        steps: steps to come, in all releases together.
        before: releases made already, which count toward the target.
        is_discrete: see `compose`.

    Returns:
        The noise multiplier.

    Raises:
        BudgetError: the releases made already leave nothing of the target, or no noise is enough.
        UsageError: an argument is out of bounds, or `dp-accounting` is not installed.
    """
    if problem := _problem("target epsilon", target_epsilon, 0, MAX_EPSILON, exclusive=True):
        raise UsageError(problem)
    if sampling_rate == 0:
        raise UsageError("sampling rate 0: no photo takes part in a step, so that no noise is needed")
    spent = compose(before, delta).epsilon
    if spent >= target_epsilon:
        raise BudgetError(
            f"an ε of {spent:.4g} was spent by {counted(len(before), 'release')} already: nothing is left of the "
            f"{target_epsilon:g} that is allowed"
        )

    def fits(noise: float) -> bool:
        new = SampledGaussian(noise_multiplier=noise, sampling_rate=sampling_rate, steps=steps)
        return compose([*before, new], delta, is_discrete=is_discrete).epsilon <= target_epsilon

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


def _problem(name: str, value: Any, low: float, high: float, *, exclusive: bool = False) -> str:
    """What is wrong with a number from outside; empty if nothing is."""
    kinds, kind = (int, "whole number") if name == "steps" else (int | float, "number")
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if is_number and (low < value < high if exclusive else low <= value <= high):
        return ""
    shown = "" if not is_number or abs(value) >= 1e15 else f" {value}"
    bounds = f"between {low:g} and {high:g}" if exclusive else f"from {low:g} to {high:,.0f}"
    return f"{name.replace('_', ' ')}{shown}: must be a {kind} {bounds}"


def _assumptions(
    releases: Sequence[SampledGaussian], delta: float, unit: Unit, *, is_discrete: bool = False
) -> tuple[str, ...]:  # fmt: skip
    what, part = ("one photo", "photo") if unit == "photo" else ("one store with all its photos", "store")
    sentences = [
        f"The unit of protection is {what}: ε compares the data with and without it (add or remove one).",
        f"Each {part}'s contribution is clipped, and the noise multiplier is the noise's standard deviation divided by "
        "the clip norm.",
        f"The number of {part}s is known: noise, sampling rate and steps follow from it.",
        _SHARED if is_discrete else _NORMAL,
        "Only the listed releases are covered. Whatever else leaves the store needs a protection of its own.",
    ]
    if unit == "client" and all(one.sampling_rate == 1 for one in releases):
        sentences.insert(
            2,
            "Which stores take part in which round is known and does not depend on photos: ε compares a store's update "
            "with none in its place.",
        )
    if any(one.sampling_rate < 1 for one in releases):
        sentences.insert(
            2,
            f"Batches are Poisson samples: each {part} is drawn independently with the sampling rate, and nobody "
            f"learns which or how many {part}s were drawn.",
        )
    return (*sentences, f"The bound may fail with a probability of about δ = {delta:g}.")


def as_release(mechanism: Mechanism) -> SampledGaussian:
    """The noise of an upload, for accounting."""
    return SampledGaussian(
        noise_multiplier=mechanism.noise_multiplier, sampling_rate=mechanism.sampling_rate, steps=mechanism.steps
    )


def as_json(mechanism: Mechanism) -> Mapping[str, object]:
    """The noise of an upload, as a ledger keeps it."""
    return as_release(mechanism).to_json()
