"""What a run's noise guarantees, from what the server has recorded.

A store's own ledger is the authority on what it released: the server cannot know of releases that never arrived.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedshelf.core.errors import NOT_ALLOWED
from fedshelf.core.events import ClientStatus, NoiseReported, Participation, RoundFinished, RoundVoid
from fedshelf.core.text import some
from fedshelf.privacy.accounting import Guarantee, SampledGaussian, Unit, compose
from fedshelf.privacy.epsilon import renyi

_RELEASED = frozenset({ClientStatus.COUNTED, ClientStatus.LATE, ClientStatus.REFUSED})
_COMPOSED = 3  # stores with the largest loss, for which the slower and tighter bound is computed


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyReport:
    """The guarantee of a run.

    Attributes:
        guarantee: that of the client whose photos are protected least, or of all clients.
        client: that client; "" if the noise is the server's.
        num_releases: by client, how often it released something; the server's models under "".
        releases: by client, all of them as one.
        rdp: by client, ε by Rényi divergences.
    """

    guarantee: Guarantee
    client: str
    num_releases: Mapping[str, int]
    releases: Mapping[str, SampledGaussian]
    rdp: Mapping[str, float]

    def to_record(self) -> dict[str, Any]:
        """Return the value of `privacy` in the output of `runs show --json`."""
        found = self.guarantee
        return {
            "epsilon": found.epsilon, "delta": found.delta, "unit": found.unit, "pld": found.pld, "rdp": found.rdp,
            "assumptions": list(found.assumptions), "client": self.client or None,
            "releases": [self._release(name, count) for name, count in self.num_releases.items()],
        }  # fmt: skip

    def _release(self, name: str, count: int) -> dict[str, Any]:
        one = self.releases[name]
        return {
            "client": name or None, "releases": count, "noise_multiplier": one.noise_multiplier,
            "sampling_rate": one.sampling_rate, "steps": one.steps, "rdp": self.rdp[name],
        }  # fmt: skip


def privacy_report(
    noise: Mapping[str, NoiseReported], rounds: Iterable[RoundFinished], voids: Iterable[RoundVoid], *, delta: float
) -> PrivacyReport | None:  # fmt: skip
    """Compute the guarantee of a run; None if it has no noise.

    Args:
        noise: the noise of each client's releases, and that of the server's under "".
        rounds: the finished rounds.
        voids: the void attempts.
        delta: δ.

    Raises:
        UsageError: `dp-accounting` is not installed.
    """
    attempts: list[RoundFinished | RoundVoid] = [*rounds, *voids]
    if "" in noise:
        counts = {"": _most_releases(attempts) if noise[""].sampling_rate == 1 else len(attempts)}
    else:
        counts = Counter(member.client for attempt in attempts for member in attempt.clients if _has_released(member))
    released = {name: _composed(noise[name], counts[name]) for name in sorted(noise) if counts[name]}
    if not released:
        return None
    rdp = {
        name: _quick_epsilon(one, delta, is_discrete=noise[name].is_discrete) for name, one in released.items()
    }  # fmt: skip
    worst = sorted(rdp, key=lambda name: -rdp[name])[:_COMPOSED]
    unit: Unit = "client" if "" in noise else "photo"
    found = {
        name: compose([released[name]], delta, unit=unit, is_discrete=noise[name].is_discrete) for name in worst
    }  # fmt: skip
    client = max(found, key=lambda name: found[name].epsilon)
    guarantee = found[client]
    if unit == "photo":
        guarantee = replace(
            guarantee, assumptions=(*guarantee.assumptions, *_told(sorted(counts.keys() - noise.keys())))
        )
    return PrivacyReport(
        guarantee=guarantee, client=client, num_releases={name: counts[name] for name in released}, releases=released,
        rdp=rdp,
    )  # fmt: skip


def _told(silent: Sequence[str]) -> list[str]:
    sentences = ["The noise is what each store reported. Only its own ledger shows what it released."]
    if silent:
        sentences.append(f"Not covered, because they reported no noise: {some(silent)}.")
    return sentences


def _has_released(member: Participation) -> bool:
    """Whether something may have left the store, unless it refused the task by itself."""
    return member.status in _RELEASED and not member.reason.startswith(NOT_ALLOWED)


def _most_releases(attempts: Sequence[RoundFinished | RoundVoid]) -> int:
    """How many sums any one client may be part of, where it is known who takes part."""
    return max(Counter(member.client for attempt in attempts for member in attempt.clients).values(), default=0)


def _quick_epsilon(released: SampledGaussian, delta: float, *, is_discrete: bool = False) -> float:
    if not released.noise_multiplier:
        return math.inf
    groups = {(released.noise_multiplier, released.sampling_rate): released.steps}
    return renyi(groups, delta, is_discrete=is_discrete)


def _composed(noise: NoiseReported, count: int) -> SampledGaussian:
    """So many releases as one."""
    return SampledGaussian(
        noise_multiplier=noise.noise_multiplier, sampling_rate=noise.sampling_rate, steps=count * noise.steps
    )
