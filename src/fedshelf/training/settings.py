"""How local training goes."""

from dataclasses import dataclass

from fedshelf.core.choices import OptimizerName
from fedshelf.data.augmentation import Augmentation
from fedshelf.training.losses import Loss


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSettings:
    """Local training. The optimizer starts fresh each round and never leaves the client.

    `gradient_clip` bounds the norm of each step's loss gradient (0: no bound); `augmentation` is None to train on
    photos as they are, `loss` for plain cross-entropy.
    """

    optimizer: OptimizerName = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    loss: Loss | None = None
    gradient_clip: float = 5.0
    batch_size: int = 16
    local_epochs: int = 2
    augmentation: Augmentation | None = Augmentation()  # noqa: RUF009  frozen
