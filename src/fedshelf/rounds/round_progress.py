"""How the members of a cohort have answered so far."""

import math
from dataclasses import dataclass, field

from fedshelf.core.events import ClientStatus, Participation
from fedshelf.scheduling.pace import per_step
from fedshelf.scheduling.work_assignment import WorkAssignment


@dataclass(kw_only=True, eq=False)
class RoundProgress:
    """What has come in, and what that cost on the wire (a server that was restarted in the round knows only its own
    part of that).

    Attributes:
        cohort: who was asked.
        orders: for what.
        needed: the quorum.
        patient_until: from then on the quorum is enough, in seconds of the round's timer.
        members: how those ended who have.
        evaluated: validation photos, of those who evaluated.
        sent: when each was (last) sent its task, in seconds of the round's timer.
        pace: seconds per local step, of those whose upload came in.
    """

    cohort: tuple[str, ...]
    assignment: WorkAssignment
    needed: int
    patient_until: float = math.inf
    members: dict[str, Participation] = field(default_factory=dict)
    evaluated: dict[str, int] = field(default_factory=dict)
    sent: dict[str, float] = field(default_factory=dict)
    pace: dict[str, float] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0

    def pending(self) -> list[str]:
        """Names of those who have not answered."""
        return [name for name in self.cohort if name not in self.members]

    def counted(self) -> list[str]:
        """Names whose upload counts, sorted."""
        return sorted(n for n, member in self.members.items() if member.status is ClientStatus.COUNTED)

    def enough(self, now: float) -> bool:
        """Whether nobody needs to be waited for any more, though not all have answered."""
        needed = self.needed if now >= self.patient_until else self.assignment.wanted
        return needed <= len(self.members) and needed <= len(self.counted())

    def late_reason(self, began: float, ended: float, timeout: float) -> str:
        """Why a client is late that had not answered when training ended; times are the timer's."""
        num_counted = len(self.counted())
        if num_counted >= self.assignment.wanted:
            return f"not needed any more: the wanted number of uploads ({num_counted}) had arrived (--over-selection)"
        if ended >= self.patient_until and num_counted >= self.needed:
            patience = f"after {self.assignment.patience:.4g} s a quorum is enough (--straggler-factor)"
            return f"no answer within {ended - began:.4g} s: {patience}"
        return f"no answer within {timeout:g} s"

    def record_pace(self, name: str, now: float) -> None:
        """Note how fast `name` was, whose upload has just come in, if anybody counts its steps."""
        if name in self.sent and name in self.assignment.num_steps:
            self.pace[name] = per_step(now - self.sent[name], self.assignment.num_steps[name])

    def pace_bounds(self, now: float) -> dict[str, float]:
        """Of those who are late: what their seconds per step are at least, now that the round is over."""
        late_reason = (name for name, member in self.members.items() if member.status is ClientStatus.LATE)
        steps = self.assignment.num_steps
        return {n: per_step(now - self.sent[n], steps[n]) for n in late_reason if n in self.sent and n in steps}

    def participations(self) -> tuple[Participation, ...]:
        """The members in the order of their names."""
        return tuple(self.members[name] for name in sorted(self.members))
