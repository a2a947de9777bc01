"""Work assignment: the steps of each client, and how many uploads suffice when.

It follows from the settings and the saved open round, so that a restarted server assigns the same work.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedshelf.core.state import OpenRound
from fedshelf.scheduling.workload import Workload

MIN_PATIENCE = 1.0  # seconds: below that, network jitter decides which client is late


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkAssignment:
    """The work of one attempt at a round.

    Attributes:
        wanted: number of uploads that suffice.
        patience: seconds after which a quorum suffices.
        num_steps: by member, its local steps; empty if work is not assigned by steps.
        changed: by member with other steps than configured, the length of its training as a multiple of the configured
            (`Workload.share`).
    """

    wanted: int
    patience: float = math.inf
    num_steps: Mapping[str, int] = field(default_factory=dict)
    changed: Mapping[str, float] = field(default_factory=dict)

    def share(self, name: str) -> float:
        """The length of the client's training, as a multiple of that of its configured epochs."""
        return self.changed.get(name, 1.0)

    def steps_for(self, name: str) -> int | None:
        """The steps to request from a client; None for its configured epochs."""
        return self.num_steps[name] if name in self.changed else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Pacing:
    """How the server adapts to machines of different speed.

    Attributes:
        straggler_factor: multiple of the median predicted duration after which a quorum suffices; None: never.
        over_selection: share by which the cohort exceeds the number of uploads that suffice.
        workload: the steps of each client.
    """

    straggler_factor: float | None = None
    over_selection: float = 0.0
    workload: Workload = Workload()  # noqa: RUF009  frozen

    @property
    def watches(self) -> bool:
        """Whether anything depends on the speed of clients."""
        return self.straggler_factor is not None or self.workload.rule != "fixed"

    def configured(self, num_train: Mapping[str, int]) -> dict[str, int]:
        """The steps of the configured epochs by client, if anything depends on them."""
        return {name: self.workload.configured(count) for name, count in num_train.items()} if self.watches else {}

    def assign(self, opened: OpenRound) -> WorkAssignment:
        """The work of the attempt `opened`."""
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
"""Treats all machines alike."""
