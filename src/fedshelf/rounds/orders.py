"""What a round asks for: how many steps of whom, until when, and how many uploads are enough.

All of it follows from the settings, the open round as it was written down and the paces in the state before it, so that
a restarted server asks for the same.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedshelf.core.state import OpenRound
from fedshelf.rounds.pace import predicted
from fedshelf.rounds.workload import Workload

SHORTEST_DEADLINE = 1.0  # seconds: below that, a network's mood decides who is late
STRICT_ATTEMPTS = 3  # at a round, by the deadline from observed speed; those after them have the whole timeout


@dataclass(frozen=True, kw_only=True, slots=True)
class Deadline:
    """When training ends: `seconds` after it began; `why` says where that comes from."""

    seconds: float
    why: str = ""

    def reason(self) -> str:
        """Why a client that has not answered is late."""
        return f"no answer within {self.seconds:.4g} s" + (f", {self.why}" if self.why else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Orders:
    """Of one attempt at a round.

    Attributes:
        num_steps: how many local steps each member is to take; empty where nobody counts them.
        changed: of those who are to take another number than their configured epochs have, how far that leads them, as
            a multiple (`Workload.share`).
        deadline: of training.
        wanted: so many uploads are enough.
    """

    num_steps: Mapping[str, int] = field(default_factory=dict)
    changed: Mapping[str, float] = field(default_factory=dict)
    deadline: Deadline
    wanted: int

    def share(self, name: str) -> float:
        """How far the client's training leads, as a multiple of what its configured epochs do."""
        return self.changed.get(name, 1.0)

    def asked(self, name: str) -> int | None:
        """What a client is told to take; None for its configured epochs, whatever number of steps these have."""
        return self.num_steps[name] if name in self.changed else None

    def late(self, num_counted: int) -> str:
        """Why a client is late that had not answered when the round ended, with `num_counted` uploads."""
        if num_counted >= self.wanted:
            return f"not needed any more: {self.wanted} uploads were wanted and in (--over-selection)"
        return self.deadline.reason()


@dataclass(frozen=True, kw_only=True, slots=True)
class Pacing:
    """What the server makes of machines that differ.

    Attributes:
        straggler_factor: training ends after so many times the median of what its members are predicted to take; None:
            at the timeout.
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

    def orders(self, opened: OpenRound, pace: Mapping[str, float], *, timeout: float) -> Orders:
        """The orders of the attempt `opened`.

        Args:
            opened: as it was written down.
            pace: seconds per local step, of the clients seen before this round.
            timeout: seconds that training may take at most.
        """
        wanted = len(opened.cohort) if opened.wanted is None else opened.wanted
        if not self.watches:
            return Orders(deadline=Deadline(seconds=timeout), wanted=wanted)
        known = predicted(pace, opened.cohort)
        num_steps = self.workload.deal(opened.num_steps, known)
        changed = {
            name: self.workload.share(num_steps[name], configured)
            for name, configured in opened.num_steps.items()
            if num_steps[name] != configured
        }
        durations = [known[name] * steps for name, steps in num_steps.items() if name in known]
        deadline = self._deadline(durations, attempt=opened.key.attempt, timeout=timeout)
        return Orders(num_steps=num_steps, changed=changed, deadline=deadline, wanted=wanted)

    def _deadline(self, durations: list[float], *, attempt: int, timeout: float) -> Deadline:
        """A deadline that was too early is twice as long the next time, and soon the timeout: a run that dies of
        clients who do not answer dies of that one."""
        if self.straggler_factor is None or not durations or attempt >= STRICT_ATTEMPTS:
            return Deadline(seconds=timeout)
        factor = self.straggler_factor * 2**attempt
        seconds = max(SHORTEST_DEADLINE, factor * statistics.median(durations))
        if seconds >= timeout:
            return Deadline(seconds=timeout)
        why = f"{factor:g} times what the cohort was predicted to take (--straggler-factor)"
        return Deadline(seconds=seconds, why=why)


UNPACED = Pacing()
"""All machines are taken to be alike."""
