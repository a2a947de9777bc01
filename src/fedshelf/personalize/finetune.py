"""Fine-tuning: Cheng, Chadha & Duchi 2021, "Fine-tuning is Fine in Federated Learning" (FTFA, fine-tuned federated
averaging); Wang et al. 2019, "Federated Evaluation of On-device Personalization", compare the model before and after.

    server:                                             client k, once the rounds are over:
     1  for each round t:                                4  v_k <- w_T
     2    w_{t+1} <- as the algorithm says               5  b_c(v_k) <- b_c(v_k) + log(K · p_k(c)), all classes c
     3  send w_T                                         6  for each of E epochs, for each batch b:
                                                         7    v_k <- v_k - eta · grad F_k(v_k; b)
                                                         8  keep v_k

E is `--finetune-epochs`, eta `--finetune-lr`. In the rounds nothing is personal: what travels, and what is evaluated
after each of them, is the algorithm's model. Line 5 is `personalize.head`: the model expects what the store stocks, as
often as it is there, before it takes a single step. E = 0 leaves it at that.

Differs from the papers: line 5 is not theirs; eta is the same at all stores and in all steps, and both are given, not
searched for; lines 1-3 are any algorithm's, not FedAvg's alone; batch-norm statistics move in line 7, too. F_k is plain
cross-entropy, whatever the rounds' loss (`training.losses` has such as leave out how often a class is there), with
the same optimizer, but on photos as they are: the model's last steps are on what it will be shown (augmented photos
show things larger: Touvron et al. 2019, "Fixing the train-test resolution discrepancy", tune on test-like photos at
last, too).
"""

from dataclasses import dataclass, replace

from torch import nn

from fedshelf.core.choices import Candidate
from fedshelf.core.messages import Broadcast
from fedshelf.core.state import ClientState
from fedshelf.personalize.head import expect
from fedshelf.training.trainer import Phase, Trainer
from fedshelf.training.workbench import Workbench


@dataclass(frozen=True, slots=True)
class FineTuning:
    """E = `epochs` at eta = `client_lr` on the last global model."""

    epochs: int
    client_lr: float
    phases: tuple[Phase, ...] = (Phase(),)
    candidates: tuple[Candidate, ...] = tuple(Candidate)
    trains_at_last: bool = True

    def personal_names(self, module: nn.Module) -> frozenset[str]:
        return frozenset()

    def equip(self, bench: Workbench, state: ClientState) -> None:
        """In the rounds a store uses the global model."""

    def keep(self, broadcast: Broadcast, before: ClientState, after: ClientState, trainer: Trainer) -> ClientState:
        return after

    def finish(self, broadcast: Broadcast, trainer: Trainer) -> None:
        bench = trainer.workbench
        expect(bench.module, trainer.train.labels)  # line 5
        plain = trainer.having(replace(bench.settings, loss="cross-entropy", augmentation=None))
        tuning = replace(plain, phases=(Phase(epochs=self.epochs),))
        tuning.fit(round=broadcast.key.round, client_lr=self.client_lr, part="-finetune")  # lines 6 and 7
