"""Limits on how often a server may compute something from a store's photos.

Training is deterministic: the same model under the same round number gives the same answer, and costs the store nothing
more. Each further model under that number would tell more about the same batches, and is refused.
"""

import math
import time
from collections.abc import Callable

from fedshelf.core.errors import PolicyError
from fedshelf.core.messages import PARAMS, Broadcast, Purpose
from fedshelf.core.text import counted
from fedshelf.privacy.policy import Policy
from fedshelf.serialization import blob
from fedshelf.storage.task_log import AcceptedTask, TaskLog

DAY = 86_400.0


class TaskLimits:
    """Accepts or refuses the tasks of a server.

    Args:
        policy: the store's policy.
        log: the tasks accepted before.
        now: seconds since 1970.
    """

    def __init__(self, policy: Policy, log: TaskLog, now: Callable[[], float] = time.time) -> None:
        self._policy = policy
        self._limits = policy.limits
        self._log = log
        self._now = now

    def accept(
        self, broadcast: Broadcast, *, num_photos: int, batch_size: int, frozen: str = "", sums: bool = False
    ) -> None:  # fmt: skip
        """Record a task before it is done. A task that is sent again is accepted again.

        Args:
            broadcast: the task, with a plain model.
            num_photos: the store's training photos.
            batch_size: photos per step in which `broadcast.num_steps` counts.
            frozen: digest of the model's frozen values.
            sums: whether the run's algorithm computes sums over photos.

        Raises:
            PolicyError: the policy does not allow the task; the message names the limit.
            RunError: the task cannot be recorded.
        """
        self._policy.check_task(broadcast, sums=sums)
        key, purpose = broadcast.key, broadcast.purpose
        task = AcceptedTask(
            run_id=key.run_id, purpose=purpose.value, round=key.round, attempt=key.attempt,
            digest=_digest(broadcast) + (f"-{frozen}" if frozen else ""),
        )  # fmt: skip
        if purpose is Purpose.TRAIN:
            self._check_steps(broadcast.num_steps, steps_per_epoch=math.ceil(num_photos / batch_size))
        if task in self._log.accepted:
            return
        alike = [known for known in self._log.accepted if (known.run_id, known.purpose) == (key.run_id, purpose.value)]
        in_round = [known for known in alike if known.round == key.round]
        limits = self._limits
        match purpose:
            case Purpose.TRAIN:
                if len({known.digest for known in in_round} | {task.digest}) > limits.models_per_round:
                    raise PolicyError(
                        f"round {key.round} was trained from another model, control variate or learning rate before: "
                        f"models-per-round = {limits.models_per_round}"
                    )
            case Purpose.EVALUATE:
                if len(in_round) >= limits.evaluations_per_round:
                    raise PolicyError(
                        f"round {key.round} was evaluated before: evaluations-per-round = "
                        f"{limits.evaluations_per_round}"
                    )
            case Purpose.COMPARE:
                rounds = broadcast.num_rounds or key.round
                if len(alike) >= limits.comparisons_per_run:
                    raise PolicyError(
                        f"this run compared models before: comparisons-per-run = {limits.comparisons_per_run}"
                    )
                if rounds > limits.max_comparison_rounds:
                    raise PolicyError(
                        f"a comparison of {counted(rounds, 'round')} is longer than max-comparison-rounds = "
                        f"{limits.max_comparison_rounds:,}"
                    )
        self._check_day(purpose)
        self._log.add(task, self._now())

    def _check_steps(self, num_steps: int | None, *, steps_per_epoch: int) -> None:
        if num_steps is None:
            return
        limits, epochs = self._limits, num_steps / steps_per_epoch
        if num_steps > limits.max_local_steps:
            raise PolicyError(
                f"{counted(num_steps, 'step')} are more than max-local-steps = {limits.max_local_steps:,}"
            )
        if epochs < limits.min_epochs_per_task:
            raise PolicyError(
                f"{counted(num_steps, 'step')} are less than min-epochs-per-task = {limits.min_epochs_per_task:g}"
            )
        if epochs > limits.max_local_epochs:
            raise PolicyError(
                f"{counted(num_steps, 'step')} are more than max-local-epochs = {limits.max_local_epochs:,}"
            )

    def _check_day(self, purpose: Purpose) -> None:
        """Run ids and round numbers are the server's to choose, so that a day is what bounds them all."""
        evaluates, since = purpose is Purpose.EVALUATE, self._now() - DAY
        alike = (at for task, at in self._log.accepted.items() if (task.purpose == Purpose.EVALUATE) == evaluates)
        most = self._limits.rounds_per_day * (self._limits.evaluations_per_round if evaluates else 1)
        if sum(at > since for at in alike) >= most:
            what = "evaluation" if evaluates else "training task"
            raise PolicyError(
                f"{counted(most, what)} were done in 24 hours: rounds-per-day = {self._limits.rounds_per_day:,}"
            )


def _digest(broadcast: Broadcast) -> str:
    """Digest of the vectors and the learning rate."""
    vectors = blob.write({PARAMS: broadcast.params, **broadcast.auxiliary}).digest
    return f"{vectors}-{broadcast.client_lr!r}"
