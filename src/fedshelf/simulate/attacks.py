"""Simulated attackers: honest clients' code with wrong labels, or with scaled uploads.

    label-flip   trains on label K - 1 - y for a photo of class y; K classes
    sign-flip    multiplies the upload by -1: opposite to the direction of training
    scale        multiplies the upload by -10: the same, large enough to outweigh all others

The whole upload, including its auxiliary vectors, is multiplied before it is compressed. Attackers validate on correct
labels and report honest metrics.

Sources: Fang et al. 2020, "Local Model Poisoning Attacks to Byzantine-Robust Federated Learning" (label flip as
K - 1 - y); Blanchard et al. 2017 (section 5: an omniscient client that uploads a multiple of the gradient's opposite).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedshelf.algorithms.base import Aggregate, Algorithm
from fedshelf.app.photos import StorePhotos
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import UsageError
from fedshelf.core.messages import Broadcast, Upload
from fedshelf.core.state import ClientState, ModelState
from fedshelf.core.text import counted, some
from fedshelf.rounds.client import Work
from fedshelf.training.trainer import Trainer

FACTORS = {"sign-flip": -1.0, "scale": -10.0}
"""Default factors by attack."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attack:
    """An attack and its attackers. Picklable.

    Attributes:
        attackers: names of the attacking clients.
        flips_labels: whether they train on wrong labels.
        factor: factor applied to their uploads; 1 leaves them unchanged.
    """

    attackers: frozenset[str] = frozenset()
    flips_labels: bool = False
    factor: float = 1.0

    def photos(self, name: str, photos: StorePhotos, num_classes: int) -> StorePhotos:
        """Return the photos that client `name` uses instead of its own.

        Args:
            name: the client's name.
            photos: its photos.
            num_classes: number of classes K.
        """
        if name not in self.attackers or not self.flips_labels:
            return photos
        return replace(photos, train=replace(photos.train, labels=num_classes - 1 - photos.train.labels))

    def work(self, name: str, work: Work) -> Work:
        """Return the work that client `name` does instead of its honest work."""
        if name not in self.attackers or self.factor == 1:
            return work
        return replace(work, algorithm=_Multiplied(work.algorithm, self.factor))


NO_ATTACK = Attack()


def attack_of(config: RunConfig, names: Sequence[str]) -> Attack:
    """Create the configured attack; the attackers are the first clients.

    Args:
        config: the run's configuration.
        names: all clients, sorted.

    Returns:
        The attack.

    Raises:
        UsageError: there are fewer clients than attackers.
    """
    if config.attackers > len(names):
        raise UsageError(
            f"--attackers {config.attackers}: there are only {counted(len(names), 'store')} ({some(names)})"
        )
    given = config.attack_factor
    return Attack(
        attackers=frozenset(names[: config.attackers]),
        flips_labels=config.attack == "label-flip",
        factor=FACTORS.get(config.attack, 1.0) if given is None else given,
    )


@dataclass(frozen=True, slots=True)
class _Multiplied(Algorithm):
    """The client half of an algorithm whose uploads are multiplied by `factor`. Client state stays honest."""

    honest: Algorithm
    factor: float

    def client_round(self, broadcast: Broadcast, state: ClientState, trainer: Trainer) -> tuple[Upload, ClientState]:
        upload, after = self.honest.client_round(broadcast, state, trainer)
        auxiliary = {name: vector * self.factor for name, vector in upload.auxiliary.items()}
        return upload.with_vectors(delta=upload.delta * self.factor).with_auxiliary(**auxiliary), after

    def server_update(self, state: ModelState, aggregate: Aggregate, population: int) -> ModelState:
        return self.honest.server_update(state, aggregate, population)
