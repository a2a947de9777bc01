"""Fine-tuning: Cheng, Chadha & Duchi 2021, "Fine-tuning is Fine in Federated Learning" (FTFA, fine-tuned federated
averaging); Wang et al. 2019, "Federated Evaluation of On-device Personalization", compare the model before and
after.

    server:                                             client k, once the rounds are over:
     1  for each round t:                                4  v_k <- w_T
     2    w_{t+1} <- as the algorithm says               5  b_c(v_k) <- b_c(v_k) + log(K · p_k(c)), all classes c
     3  send w_T                                         6  for each of E epochs e:
                                                         7    for each batch b: v_k <- v_k - eta · grad F_k(v_k; b)
                                                         8    u_e <- v_k
                                                         9  keep the mean of u_1 .. u_E (v_k where E = 0)

E is `--finetune-epochs`, eta `--finetune-lr`. Nothing is personal during the rounds: the algorithm's model is sent and
evaluated. Line 5 is `personalization.head`: before the first step, the model expects each product as often as the store
stocks it. Line 9: steps at a constant rate end somewhere around the optimum that they approach; the mean of their
iterates is nearer to it, and to w_T (Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better
Generalization", with a mean per epoch as there).

Differs from the papers: lines 5, 8 and 9 are added; eta is the same at all stores and in all steps, and both are given,
not searched for; lines 1-3 are any algorithm's, not only FedAvg's; the optimizer starts fresh each epoch; batch-norm
statistics change in line 7 and are also averaged in line 9. F_k is plain cross-entropy of unsmoothed labels for any
loss of the rounds (smoothed labels expect each class everywhere, and some `training.losses` ignore class frequencies),
with the same optimizer, the same rate for the output layer as for the others, but on photos that are at most mirrored:
the model's last steps use the same views as inference (cropped photos show things larger: Touvron et al. 2019, "Fixing
the train-test resolution discrepancy", also tune on test-like photos last).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from fedshelf.core.settings import Setting
from fedshelf.personalization.base import Personalization
from fedshelf.training.phases import Phase

if TYPE_CHECKING:
    from fedshelf.data.augmentation import Augmentation
    from fedshelf.personalization.base import Broadcast, Trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class FineTuning(Personalization):
    """Fine-tuning of the last global model.

    Attributes:
        epochs: number of epochs (E).
        client_lr: learning rate (eta).
    """

    epochs: Annotated[int, Setting(key="finetune_epochs", help="Epochs of fine-tuning after the last round.",
        ge=0)] = 8  # fmt: skip
    client_lr: Annotated[float, Setting(key="finetune_lr", help="Learning rate of fine-tuning.", gt=0)] = 0.005
    trains_at_last: ClassVar[bool] = True
    uses: ClassVar[tuple[str, ...]] = ("optimizer", "momentum", "weight_decay", "gradient_clip", "augment")

    def finalize(self, broadcast: Broadcast, trainer: Trainer) -> None:
        from fedshelf.personalization.head import add_class_prior

        bound = trainer.bound_model
        add_class_prior(bound.module, trainer.train.labels)  # line 5
        settings = replace(
            bound.settings,
            loss=None,
            label_smoothing=0.0,
            head_lr_factor=1.0,
            augmentation=_mirrored(bound.settings.augmentation),
        )
        epoch = replace(trainer.having(settings), phases=(Phase(epochs=1),))
        values = bound.params.changing
        mean = values.new_zeros(len(values))
        for number in range(self.epochs):
            epoch.fit(round=broadcast.key.round, client_lr=self.client_lr, part=f"-finetune-{number}")  # line 7
            mean += values / self.epochs
        if self.epochs:
            values.copy_(mean)  # line 9


def _mirrored(views: Augmentation | None) -> Augmentation | None:
    """Reduce the views of the rounds to mirroring."""
    if views is None:
        return None
    return replace(views, crop_scale=(1.0, 1.0), rotation_degrees=0.0, brightness=0.0, contrast=0.0)
