"""Fine-tuning: Cheng, Chadha & Duchi 2021, "Fine-tuning is Fine in Federated Learning" (FTFA, fine-tuned federated
averaging); Wang et al. 2019, "Federated Evaluation of On-device Personalization", compare the model before and after.

    server:                                             client k, once the rounds are over:
     1  for each round t:                                4  v_k <- w_T
     2    w_{t+1} <- as the algorithm says               5  for each of E epochs, for each batch b:
     3  send w_T                                         6    v_k <- v_k - eta · grad F_k(v_k; b)
                                                         7  keep v_k

E is `--finetune-epochs`, eta `--finetune-lr`. In the rounds nothing is personal: what travels, and what is evaluated
after each of them, is the algorithm's model.

Differs from the papers: eta is the same at all stores and in all steps, and both are given, not searched for; lines 1-3
are any algorithm's, not FedAvg's alone; batch-norm statistics move in line 6, too. F_k is the loss of the rounds, with
the same optimizer, but on photos as they are: the model's last steps are on what it will be shown (augmented photos
show things larger: Touvron et al. 2019, "Fixing the train-test resolution discrepancy", tune on test-like photos at
last, too).
"""

from dataclasses import dataclass, replace

from torch import nn

from fedshelf.core.choices import Candidate
from fedshelf.core.messages import Broadcast
from fedshelf.core.state import ClientState
from fedshelf.training.trainer import Phase, Trainer
from fedshelf.training.workbench import Workbench


@dataclass(frozen=True, slots=True)
class FineTuning:
    """E = `epochs` at eta = `client_lr` on the last global model."""

    epochs: int
    client_lr: float
    phases: tuple[Phase, ...] = (Phase(),)
    candidates: tuple[Candidate, ...] = tuple(Candidate)

    def personal_names(self, module: nn.Module) -> frozenset[str]:
        return frozenset()

    def equip(self, bench: Workbench, state: ClientState) -> None:
        """In the rounds a store uses the global model."""

    def keep(self, broadcast: Broadcast, before: ClientState, after: ClientState, trainer: Trainer) -> ClientState:
        return after

    def finish(self, broadcast: Broadcast, trainer: Trainer) -> None:
        bench = trainer.workbench
        as_they_are = replace(bench, settings=replace(bench.settings, augmentation=None))
        tuning = replace(trainer, workbench=as_they_are, phases=(Phase(epochs=self.epochs),))
        tuning.fit(round=broadcast.key.round, client_lr=self.client_lr, part="-finetune")  # lines 5 and 6
