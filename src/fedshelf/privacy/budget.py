"""A store's privacy budget: the ε of its photos, composed over all that its ledger says, of any run and server.

Every release counts once it is intended, also if the server did not use it.
"""

import math
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta

from fedshelf.core.errors import PolicyError
from fedshelf.core.messages import Mechanism
from fedshelf.core.text import counted
from fedshelf.privacy.accounting import SampledGaussian, as_release, compose
from fedshelf.privacy.base import DEFAULT_DELTA
from fedshelf.privacy.ledger import Release

PERIOD = timedelta(days=365)
_FROM_PHOTOS = frozenset({"train", "closed-form", "evaluate", "compare"})
"""Purposes of releases that are computed from photos; those of others tell counts and names."""


class Budget:
    """The budget of one store.

    Args:
        releases: returns what the store has released so far.
        epsilon: the most that ε may be; None: no limit.
        delta: δ.
        now: returns the time.
    """

    def __init__(
        self, releases: Callable[[], Iterable[Release]], *, epsilon: float | None = None, delta: float = DEFAULT_DELTA,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:  # fmt: skip
        self._releases = releases
        self._epsilon, self._delta, self._now = epsilon, delta, now

    def spent_with(self, mechanism: Mechanism) -> float:
        """The ε of the last 365 days, with one more release. Infinite if something has left without noise.

        Args:
            mechanism: the noise in that release.

        Raises:
            PolicyError: it would be more than the budget.
            UsageError: `dp-accounting` is not installed.
        """
        oldest = (self._now() - PERIOD).isoformat()
        before = [release for release in self._releases() if release.time >= oldest and release.purpose in _FROM_PHOTOS]
        noised = [SampledGaussian.from_json(release.mechanism) for release in before if release.mechanism is not None]
        bare = next((release for release in before if release.mechanism is None), None)
        spent = math.inf if bare else compose([*noised, as_release(mechanism)], self._delta).epsilon
        if self._epsilon is None or spent <= self._epsilon:
            return spent
        if bare is not None:
            raise PolicyError(
                f"its privacy budget holds for no ε: entry {bare.number} of this store's ledger, of {bare.time[:10]}, "
                f"left without noise ({bare.purpose}). It counts for 365 days"
            )
        raise PolicyError(
            f"its privacy budget is used up: {counted(len(before), 'release')} of the last 365 days and this one would "
            f"give an ε of {spent:.4g} at δ = {self._delta:g}, and epsilon = {self._epsilon:g}"
        )
