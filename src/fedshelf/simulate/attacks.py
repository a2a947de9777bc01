"""What simulated attackers do: honest clients' own code on wrong labels, or honest uploads that are multiplied.

    label-flip   a photo of class y is taken for one of class K - 1 - y, in training; K classes
    sign-flip    the upload times -1: away from where training leads
    scale        the upload times -10: the same, and loud enough to outweigh everybody else

An upload is multiplied whole, with what it carries beside its delta, before it is compressed. Attackers validate on
their right labels: what they report of a model is honest.

Sources: Fang et al. 2020, "Local Model Poisoning Attacks to Byzantine-Robust Federated Learning" (label flip as
K - 1 - y); Blanchard et al. 2017 (section 5: an omniscient client that uploads a multiple of the gradient's opposite).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedshelf.algorithms.base import Aggregate, Algorithm
from fedshelf.app.components import StorePhotos
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import UsageError
from fedshelf.core.messages import Broadcast, Upload
from fedshelf.core.state import ClientState, ServerState
from fedshelf.core.text import counted, some
from fedshelf.data.dataset import PhotoSet
from fedshelf.rounds.client import Work
from fedshelf.training.trainer import Trainer

FACTORS = {"sign-flip": -1.0, "scale": -10.0}
"""What uploads are multiplied by unless the run says otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attack:
    """Who attacks, and how. Picklable.

    Attributes:
        attackers: their names.
        flips_labels: whether they train on wrong labels.
        factor: what their uploads are multiplied by; 1 leaves them as they are.
    """

    attackers: frozenset[str] = frozenset()
    flips_labels: bool = False
    factor: float = 1.0

    def photos(self, name: str, photos: StorePhotos, num_classes: int) -> StorePhotos:
        """What client `name` works on in place of its own `photos`."""
        if name not in self.attackers or not self.flips_labels:
            return photos
        return replace(photos, train=PhotoSet(photos.train.images, num_classes - 1 - photos.train.labels))

    def work(self, name: str, work: Work) -> Work:
        """What client `name` does in place of its honest `work`."""
        if name not in self.attackers or self.factor == 1:
            return work
        return replace(work, algorithm=_Multiplied(work.algorithm, self.factor))


NO_ATTACK = Attack()


def attack_of(config: RunConfig, names: Sequence[str]) -> Attack:
    """The configured attack among clients `names`, which are sorted: the first of them are the attackers.

    Raises:
        UsageError: there are not so many clients.
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
    """The client half of an algorithm whose clients send a multiple of what they should. They keep the state of honest
    ones."""

    honest: Algorithm
    factor: float

    def client_round(self, broadcast: Broadcast, state: ClientState, trainer: Trainer) -> tuple[Upload, ClientState]:
        upload, after = self.honest.client_round(broadcast, state, trainer)
        auxiliary = {name: vector * self.factor for name, vector in upload.auxiliary.items()}
        return upload.with_vectors(delta=upload.delta * self.factor).with_auxiliary(**auxiliary), after

    def server_update(self, state: ServerState, aggregate: Aggregate, population: int) -> ServerState:
        return self.honest.server_update(state, aggregate, population)
