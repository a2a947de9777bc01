"""How long simulated clients take, in virtual seconds, and when they break off.

Training is all that takes virtual time: photos trained on, times the store's slowdown, over `PHOTOS_PER_SECOND`. So a
task's duration is known before anybody computes it, and is the same on every machine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedshelf.algorithms.base import Asynchronous
from fedshelf.app.components import algorithm_of
from fedshelf.config.schema import RunConfig, parse_slowdowns
from fedshelf.core.errors import UsageError
from fedshelf.core.messages import Broadcast, Purpose, ServerMessage, TaskKey, keyed
from fedshelf.core.rng import Rng
from fedshelf.core.text import counted, some

PHOTOS_PER_SECOND = 100.0
"""Photos that a store of slowdown 1 trains on in a virtual second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Durations:
    """`slowdowns` by client, 1 for those not named; `local_epochs` and `batch_size` as clients train."""

    slowdowns: Mapping[str, float] = field(default_factory=dict)
    local_epochs: int = 1
    batch_size: int = 1

    def seconds(self, client: str, message: ServerMessage, num_train: int) -> float:
        """How long `client`, who has `num_train` photos to train on, takes for what `message` asks."""
        if not isinstance(message, Broadcast) or message.purpose is not Purpose.TRAIN:
            return 0.0
        return self.slowdowns.get(client, 1.0) * self._num_photos(message.num_steps, num_train) / PHOTOS_PER_SECOND

    def _num_photos(self, num_steps: int | None, num_train: int) -> int:
        """Photos in so many steps: the last batch of an epoch has what is left."""
        if num_steps is None:
            return num_train * self.local_epochs
        epochs, steps = divmod(num_steps, max(1, -(-num_train // self.batch_size)))
        return epochs * num_train + min(steps * self.batch_size, num_train)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropout:
    """Each training is broken off with `probability`, at a moment that is uniform over its duration.

    `rng` is the run's root. The draw is keyed by the task and by how often the client was given it before.
    """

    probability: float = 0.0
    rng: Rng = Rng(0)  # noqa: RUF009  frozen

    def missing(self, client: str, key: TaskKey, repetition: int = 0) -> float | None:
        """The part of the task that is still to be done when the client breaks off; None if it does not."""
        if not self.probability:
            return None
        purpose = keyed("dropout", key) + (f"-repeated-{repetition}" if repetition else "")
        draw = self.rng.fork(round=key.round, client=client, purpose=purpose).python()
        if draw.random() >= self.probability:
            return None
        return 1.0 - draw.random()


def needs_order(config: RunConfig) -> bool:
    """Whether answers must come in the order of virtual time: where that, or a deadline, decides the result. Else they
    come as they are computed, which is faster."""
    by_speed = config.straggler_factor is not None or config.over_selection > 0 or config.local_work != "fixed"
    return (
        by_speed or config.slowdowns is not None or config.dropout > 0 or isinstance(algorithm_of(config), Asynchronous)
    )  # fmt: skip


def durations_of(config: RunConfig, names: Sequence[str]) -> Durations:
    """How long clients `names`, which are sorted, take.

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
    """The configured dropout."""
    return Dropout(probability=config.dropout, rng=Rng(config.seed))
