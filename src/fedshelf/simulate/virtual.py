"""Durations of simulated tasks in virtual seconds, and simulated dropout.

Only training takes virtual time: the number of photos trained on, times the store's slowdown, divided by
`PHOTOS_PER_SECOND`. A task's duration is therefore known before it is computed, and is the same on every machine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedshelf.config.schema import RunConfig, parse_slowdowns
from fedshelf.core.errors import UsageError
from fedshelf.core.messages import Broadcast, Purpose, ServerMessage, TaskKey, keyed
from fedshelf.core.rng import Rng
from fedshelf.core.text import counted, some

PHOTOS_PER_SECOND = 100.0
"""Photos per virtual second that a store with slowdown 1 trains on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Durations:
    """Task durations.

    Attributes:
        slowdowns: slowdown by client; 1 for clients not listed.
        local_epochs: epochs per round.
        batch_size: photos per training step.
    """

    slowdowns: Mapping[str, float] = field(default_factory=dict)
    local_epochs: int = 1
    batch_size: int = 1

    def seconds(self, client: str, message: ServerMessage, num_train: int) -> float:
        """Return a task's duration in virtual seconds.

        Args:
            client: the client's name.
            message: the task.
            num_train: number of the client's training photos.
        """
        if not isinstance(message, Broadcast) or message.purpose is not Purpose.TRAIN:
            return 0.0
        return self.slowdowns.get(client, 1.0) * self._num_photos(message.num_steps, num_train) / PHOTOS_PER_SECOND

    def _num_photos(self, num_steps: int | None, num_train: int) -> int:
        """Return the number of photos in `num_steps` steps; an epoch's last batch may be smaller."""
        if num_steps is None:
            return num_train * self.local_epochs
        epochs, steps = divmod(num_steps, max(1, -(-num_train // self.batch_size)))
        return epochs * num_train + min(steps * self.batch_size, num_train)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropout:
    """Random dropout: each training stops with `probability`, at a time uniform over its duration.

    Draws depend on the task and on how often it was dispatched to the client before.

    Attributes:
        probability: probability of dropping out.
        rng: the run's root generator.
    """

    probability: float = 0.0
    rng: Rng = Rng(0)  # noqa: RUF009  frozen

    def missing(self, client: str, key: TaskKey, repetition: int = 0) -> float | None:
        """Return the fraction of the task that is left when the client drops out; None if it does not."""
        if not self.probability:
            return None
        purpose = keyed("dropout", key) + (f"-repeated-{repetition}" if repetition else "")
        draw = self.rng.fork(round=key.round, client=client, purpose=purpose).python()
        if draw.random() >= self.probability:
            return None
        return 1.0 - draw.random()


def durations_of(config: RunConfig, names: Sequence[str]) -> Durations:
    """Return the configured task durations.

    Args:
        config: the run's configuration.
        names: all clients, sorted.

    Raises:
        UsageError: there are more slowdowns than clients.
    """
    slowdowns = parse_slowdowns(config.slowdowns) if config.slowdowns is not None else (1.0,)
    if len(slowdowns) > len(names):
        raise UsageError(
            f"--slowdowns {config.slowdowns}: {counted(len(slowdowns), 'number')} for {counted(len(names), 'store')} "
            f"({some(names)}). Give one for each in the order of names, or fewer: they are then repeated"
        )
    by_store = {name: slowdowns[i % len(slowdowns)] for i, name in enumerate(names)}
    return Durations(slowdowns=by_store, local_epochs=config.local_epochs, batch_size=config.batch_size)


def dropout_of(config: RunConfig) -> Dropout:
    """Return the configured dropout."""
    return Dropout(probability=config.dropout, rng=Rng(config.seed))
