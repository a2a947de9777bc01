"""Settings of local training."""

from dataclasses import dataclass

from fedshelf.core.choices import OptimizerName
from fedshelf.data.augmentation import Augmentation
from fedshelf.training.distillation import Distillation
from fedshelf.training.losses import Loss


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSettings:
    """Settings of local training. The optimizer starts fresh each round and never leaves the client.

    Attributes:
        optimizer: the optimizer.
        momentum: SGD's momentum.
        weight_decay: weight decay.
        label_smoothing: label smoothing.
        loss: a calibrated loss; None: plain cross-entropy.
        gradient_clip: bound on the norm of each step's loss gradient, for the output layer and the rest apart if their
            learning rates differ; 0: unbounded.
        backbone_lr_factor: learning rate of all but the output layer, as a multiple of the round's.
        head_lr_factor: learning rate of the output layer, as a multiple of the round's.
        unfreeze_after: rounds in which the output layer alone is trained.
        batch_size: photos in a batch.
        local_epochs: epochs per round.
        augmentation: random views of photos; None: photos as they are.
        distillation: how much is learned from a teacher; None: nothing.
    """

    optimizer: OptimizerName = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    loss: Loss | None = None
    gradient_clip: float = 5.0
    backbone_lr_factor: float = 1.0
    head_lr_factor: float = 1.0
    unfreeze_after: int = 0
    batch_size: int = 16
    local_epochs: int = 2
    augmentation: Augmentation | None = Augmentation()  # noqa: RUF009  frozen
    distillation: Distillation | None = None

    @property
    def has_head_lr(self) -> bool:
        """Whether the output layer and the rest have learning rates of their own."""
        return self.backbone_lr_factor != self.head_lr_factor
