"""A store's privacy budget: the ε of its photos, composed over all that its ledgers say, of any run and server.

Every release counts once it is intended, also if the server did not use it.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fedshelf.core.errors import BudgetError, PolicyError, RunError
from fedshelf.core.messages import Mechanism
from fedshelf.core.text import counted
from fedshelf.privacy.accounting import SampledGaussian, as_release, compose, noise_multiplier_for
from fedshelf.privacy.base import DEFAULT_DELTA
from fedshelf.privacy.ledger_content import Release

logger = logging.getLogger(__name__)

PERIOD = timedelta(days=365)


class Budget:
    """The budget of one store.

    Args:
        releases: returns what the store has released so far.
        epsilon: the most that ε may be; None: no limit.
        delta: δ.
        others: returns what has left of the same photos by other ledgers, by state directory.
        now: returns the time.
    """

    def __init__(
        self, releases: Callable[[], Iterable[Release]], *, epsilon: float | None = None, delta: float = DEFAULT_DELTA,
        others: Callable[[], Mapping[Path, Iterable[Release]]] = dict,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:  # fmt: skip
        self._releases, self._others = releases, others
        self._epsilon, self._delta, self._now = epsilon, delta, now

    def spent_with(self, mechanism: Mechanism) -> float:
        """The ε of the last 365 days, with one more release. Infinite if something has left without noise.

        Args:
            mechanism: the noise in that release.

        Raises:
            PolicyError: it would be more than the budget.
            UsageError: `dp-accounting` is not installed.
        """
        noised = self._noised()
        spent = math.inf if noised is None else compose([*noised, as_release(mechanism)], self._delta).epsilon
        if self._epsilon is not None and not spent <= self._epsilon:
            raise _refusal(self._why_not(spent, noised or ()))
        return spent

    def noise_multiplier(
        self, run_id: str, *, target_epsilon: float, delta: float, sampling_rate: float, steps: int
    ) -> float:
        """The noise with which a run stays within its target and within the budget; that of its earlier releases.

        Args:
            run_id: the run.
            target_epsilon: the run's ε.
            delta: the run's δ.
            sampling_rate: probability with which each photo takes part in a step.
            steps: steps of the whole run.

        Raises:
            PolicyError: the budget leaves nothing for this run.
            UsageError: `dp-accounting` is not installed.
        """
        uploads = [release for release in self._releases() if release.run_id == run_id and release.kind == "upload"]
        if known := [upload.mechanism for upload in uploads if upload.mechanism]:
            return SampledGaussian.from_json(known[-1]).noise_multiplier
        needed = noise_multiplier_for(target_epsilon, delta, sampling_rate=sampling_rate, steps=steps)
        if self._epsilon is None:
            return needed
        try:
            left = noise_multiplier_for(
                self._epsilon, self._delta, sampling_rate=sampling_rate, steps=steps, before=self._noised() or ()
            )
        except BudgetError as error:
            raise _refusal(str(error)) from error
        return max(needed, left)

    def _why_not(self, spent: float, before: Sequence[SampledGaussian]) -> str:
        budget = f"the budget is epsilon = {self._epsilon:g} in 365 days (δ = {self._delta:g})"
        if not before:
            return f"one round of this run needs an ε of {spent:.4g}, and {budget}. The run needs more noise"
        known = compose(before, self._delta).epsilon
        return (
            f"{counted(len(before), 'release')} of the last 365 days gave an ε of {known:.4g}, one more would make it "
            f"{spent:.4g}, and {budget}"
        )

    def _noised(self) -> list[SampledGaussian] | None:
        """What has left in the last 365 days; None if something left without noise, or it is not known.

        Raises:
            PolicyError: that is so, and there is a budget.
        """
        oldest = (self._now() - PERIOD).isoformat()
        ledgers = {"this store's ledger": self._releases()}
        try:
            ledgers |= {f"the ledger in '{folder}'": releases for folder, releases in self._others().items()}
        except RunError as error:
            if self._epsilon is None:
                return None
            raise _refusal(f"what has left of these photos is not known: {error}") from error
        before = {  # the same bytes tell two servers no more than one
            release.digest: (release, ledger)
            for ledger, releases in ledgers.items()
            for release in releases
            if release.time >= oldest and release.is_from_photos
        }
        bare, where = next((found for found in before.values() if found[0].is_bare), (None, ""))
        if bare is None:
            return [SampledGaussian.from_json(release.mechanism) for release, _ in before.values()]
        if self._epsilon is None:
            return None
        raise _refusal(
            f"entry {bare.number} of {where}, of {bare.time[:10]}, left without noise ({bare.purpose}), so that no ε "
            f"bounds what has left for 365 days, and the budget is epsilon = {self._epsilon:g}"
        )


def _refusal(why: str) -> PolicyError:
    """The error that a server sees, which does not tell what the store did for others; logs why for the store."""
    logger.warning("the privacy budget does not allow this run: %s", why)
    return PolicyError("its privacy budget does not allow this release. The store's own log says more")


NO_BUDGET = Budget(tuple)
"""That of a store without a ledger, in a simulation."""
