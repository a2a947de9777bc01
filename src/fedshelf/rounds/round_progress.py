"""The progress of a round: how the members of a cohort have replied so far."""

import math
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedshelf.core.events import ClientStatus, Participation
from fedshelf.core.messages import Evaluation
from fedshelf.rounds.sums.evaluations import SummedEvaluation
from fedshelf.scheduling.pace import per_step
from fedshelf.scheduling.work_assignment import WorkAssignment


@dataclass(kw_only=True, eq=False)
class RoundProgress:
    """Replies received so far, and their traffic. After a restart, traffic before it is not included.

    Attributes:
        cohort: the clients asked.
        assignment: the work assigned to them.
        needed: the quorum.
        patient_until: when the quorum becomes sufficient, in seconds of the round's timer.
        members: members that have ended the round.
        evaluated: by client, validation photos evaluated.
        losses: by client, its mean loss on them.
        clip_norm: the next round's norm of uploads, if it adapts.
        held_out: values [S] of the new model before the validation photos became a part of it; None if they did not.
        evaluations: by client, its evaluation.
        summed: the figures of all stores' evaluations, if uploads are decoded as a sum only.
        sent: by client, when its task was last sent, in seconds of the round's timer.
        pace: by client, seconds per local step, once its upload has arrived.
        train_loss: mean loss of all members, if it arrives as a sum.
        bytes_up: payload received.
        bytes_down: payload sent.
    """

    cohort: tuple[str, ...]
    assignment: WorkAssignment
    needed: int
    patient_until: float = math.inf
    members: dict[str, Participation] = field(default_factory=dict)
    evaluated: dict[str, int] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    held_out: Tensor | None = None
    clip_norm: float | None = None
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    summed: SummedEvaluation | None = None
    sent: dict[str, float] = field(default_factory=dict)
    pace: dict[str, float] = field(default_factory=dict)
    train_loss: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0

    def pending(self) -> list[str]:
        """Names of the members that have not replied."""
        return [name for name in self.cohort if name not in self.members]

    def counted(self) -> list[str]:
        """Names of the members whose upload counts, sorted."""
        return sorted(n for n, member in self.members.items() if member.status is ClientStatus.COUNTED)

    def refuse(self, name: str, reason: str) -> None:
        """Record that the upload of `name`, counted so far, is not used."""
        self.members[name] = replace(self.members[name], status=ClientStatus.REFUSED, reason=reason)

    def enough(self, now: float) -> bool:
        """Whether there are enough uploads to stop waiting."""
        needed = self.needed if now >= self.patient_until else self.assignment.wanted
        return needed <= len(self.members) and needed <= len(self.counted())

    def late_reason(self, began: float, ended: float, timeout: float) -> str:
        """Why a client without a reply is late.

        Args:
            began: when training started, in seconds of the timer.
            ended: when training ended, in seconds of the timer.
            timeout: time limit in seconds.
        """
        num_counted = len(self.counted())
        if num_counted >= self.assignment.wanted:
            return f"not needed any more: the wanted number of uploads ({num_counted}) had arrived (--over-selection)"
        if ended >= self.patient_until and num_counted >= self.needed:
            patience = f"after {self.assignment.patience:.4g} s a quorum is enough (--straggler-factor)"
            return f"no answer within {ended - began:.4g} s: {patience}"
        return f"no answer within {timeout:g} s"

    def record_pace(self, name: str, now: float) -> None:
        """Record the pace of `name`, whose upload has just arrived, if its steps are known."""
        if name in self.sent and name in self.assignment.num_steps:
            self.pace[name] = per_step(now - self.sent[name], self.assignment.num_steps[name])

    def pace_bounds(self, now: float) -> dict[str, float]:
        """Lower bounds on the seconds per step of late clients at the end of the round."""
        late_reason = (name for name, member in self.members.items() if member.status is ClientStatus.LATE)
        steps = self.assignment.num_steps
        return {n: per_step(now - self.sent[n], steps[n]) for n in late_reason if n in self.sent and n in steps}

    def participations(self) -> tuple[Participation, ...]:
        """The members, sorted by name."""
        return tuple(self.members[name] for name in sorted(self.members))
