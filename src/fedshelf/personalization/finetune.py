"""Fine-tuning: Cheng, Chadha & Duchi 2021, "Fine-tuning is Fine in Federated Learning" (FTFA, fine-tuned federated
averaging); Wang et al. 2019, "Federated Evaluation of On-device Personalization", compare the model before and after.

    server:                                             client k, once the rounds are over:
     1  for each round t:                                4  v_k <- w_T
     2    w_{t+1} <- as the algorithm says               5  b_c(v_k) <- b_c(v_k) + log(K · p_k(c)), all classes c
     3  send w_T                                         6  for each of E epochs e:
                                                         7    for each batch b: v_k <- v_k - eta · grad F_k(v_k; b)
                                                         8    u_e <- v_k
                                                         9  keep the mean of u_1 .. u_E (v_k where E = 0)

E is `--finetune-epochs`, eta `--finetune-lr`. In the rounds nothing is personal: what travels, and what is evaluated
after each of them, is the algorithm's model. Line 5 is `personalization.head`: the model expects each product as often
as the store stocks it, before it takes a single step. Line 9: steps at a constant rate end somewhere around what they
approach; the mean of where they were is nearer to it, and to w_T (Izmailov et al. 2018, "Averaging Weights Leads to
Wider Optima and Better Generalization", with a mean per epoch as there).

Differs from the papers: lines 5, 8 and 9 are not theirs; eta is the same at all stores and in all steps, and both are
given, not searched for; lines 1-3 are any algorithm's, not FedAvg's alone; the optimizer starts fresh each epoch;
batch-norm statistics move in line 7 and are averaged in line 9, too. F_k is plain cross-entropy of unsmoothed labels,
whatever the rounds' loss (smoothed labels expect each class everywhere, and `training.losses` has losses that leave out
how often one is there), with the same optimizer, but on photos that are at most mirrored: the model's last steps are on
what it will be shown (cropped photos show things larger: Touvron et al. 2019, "Fixing the train-test resolution
discrepancy", tune on test-like photos at last, too).
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
    """E = `epochs` at eta = `client_lr` on the last global model."""

    epochs: Annotated[int, Setting(key="finetune_epochs", help="Epochs of fine-tuning after the last round.",
        ge=0)] = 8  # fmt: skip
    client_lr: Annotated[float, Setting(key="finetune_lr", help="Learning rate of fine-tuning.", gt=0)] = 0.005
    trains_at_last: ClassVar[bool] = True

    def finalize(self, broadcast: Broadcast, trainer: Trainer) -> None:
        from fedshelf.personalization.head import expect

        bound = trainer.bound_model
        expect(bound.module, trainer.train.labels)  # line 5
        settings = replace(
            bound.settings,
            loss=None,
            label_smoothing=0.0,
            augmentation=_mirrored(bound.settings.augmentation),
        )
        epoch = replace(trainer.having(settings), phases=(Phase(epochs=1),))
        mean = bound.params.vector.new_zeros(len(bound.params.vector))
        for number in range(self.epochs):
            epoch.fit(round=broadcast.key.round, client_lr=self.client_lr, part=f"-finetune-{number}")  # line 7
            mean += bound.params.vector / self.epochs
        if self.epochs:
            bound.params.vector.copy_(mean)  # line 9


def _mirrored(views: Augmentation | None) -> Augmentation | None:
    """Of the views that the rounds train on: none but mirrored ones."""
    if views is None:
        return None
    return replace(views, crop_scale=(1.0, 1.0), rotation_degrees=0.0, brightness=0.0, contrast=0.0)
