"""What a round asks for: how many steps of whom, and when how many uploads are enough.

All of it follows from the settings and the open round as it was written down, so that a restarted server asks for the
same.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedshelf.core.state import OpenRound
from fedshelf.scheduling.workload import Workload

MIN_PATIENCE = 1.0  # seconds: below that, a network's mood decides who is late


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkAssignment:
    """Of one attempt at a round.

    Attributes:
        wanted: so many uploads are enough.
        patience: seconds after which a quorum is enough, too.
        num_steps: how many local steps each member is to take; empty where nobody counts them.
        changed: of those who are to take another number than their configured epochs have, how far that leads them, as
            a multiple (`Workload.share`).
    """

    wanted: int
    patience: float = math.inf
    num_steps: Mapping[str, int] = field(default_factory=dict)
    changed: Mapping[str, float] = field(default_factory=dict)

    def share(self, name: str) -> float:
        """How far the client's training leads, as a multiple of what its configured epochs do."""
        return self.changed.get(name, 1.0)

    def steps_for(self, name: str) -> int | None:
        """What a client is told to take; None for its configured epochs, whatever number of steps these have."""
        return self.num_steps[name] if name in self.changed else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Pacing:
    """What the server makes of machines that differ.

    Attributes:
        straggler_factor: after so many times the median of what its members are predicted to take, a round waits for a
            quorum alone; None: never.
        over_selection: the cohort is so much larger, as a share, than the number of uploads that are enough.
        workload: how many steps each is given.
    """

    straggler_factor: float | None = None
    over_selection: float = 0.0
    workload: Workload = Workload()  # noqa: RUF009  frozen

    @property
    def watches(self) -> bool:
        """Whether anything depends on how fast clients are."""
        return self.straggler_factor is not None or self.workload.rule != "fixed"

    def configured(self, num_train: Mapping[str, int]) -> dict[str, int]:
        """How many steps the configured epochs have at clients of so many photos, if anything depends on that."""
        return {name: self.workload.configured(count) for name, count in num_train.items()} if self.watches else {}

    def assign(self, opened: OpenRound) -> WorkAssignment:
        """The orders of the attempt `opened`."""
        wanted = len(opened.cohort) if opened.wanted is None else opened.wanted
        num_steps = self.workload.deal(opened.num_steps, opened.pace)
        changed = {
            name: self.workload.share(num_steps[name], configured)
            for name, configured in opened.num_steps.items()
            if num_steps[name] != configured
        }
        durations = [opened.pace[name] * steps for name, steps in num_steps.items() if name in opened.pace]
        return WorkAssignment(wanted=wanted, patience=self._patience(durations), num_steps=num_steps, changed=changed)

    def _patience(self, durations: list[float]) -> float:
        if self.straggler_factor is None or not durations:
            return math.inf
        return max(MIN_PATIENCE, self.straggler_factor * statistics.median(durations))


UNPACED = Pacing()
"""All machines are taken to be alike."""
