"""FedRep: Collins et al. 2021, "Exploiting Shared Representations for Personalized Federated Learning", Algorithm 1.

    server:                                             client i:
     1  for each round t:                                4  (phi, own h_i) <- phi_t, its head of the round before
     2    each i: phi_i                                  5  for tau epochs: h_i <- h_i - alpha · grad_h l(phi, h_i)
     3    phi_{t+1} <- sum_i n_i/n · phi_i               6  for some epochs: phi <- phi - alpha · grad_phi l(phi, h_i)
                                                         7  send phi; keep h_i

The head h is the last layer. While one of the two is trained, the other is fixed.

Differs from the paper: line 6 runs for `--local-epochs` epochs (one step in the paper's algorithm, some epochs in its
experiments); the paper averages uniformly; batch-norm statistics, which belong to phi, also change in line 5.
"""

from typing import Annotated

from fedshelf.core.settings import Setting
from fedshelf.personalization.base import PersonalLayers
from fedshelf.personalization.fedper import personal_names
from fedshelf.training.phases import Moves, Phase

HEAD_EPOCHS = Setting(
    key="fedrep_head_epochs", help="Epochs on the last layer alone, before the rest is trained.", ge=1
)


def fedrep(head_epochs: Annotated[int, HEAD_EPOCHS] = 2) -> PersonalLayers:
    """FedRep with tau = `head_epochs`."""
    phases = (Phase(moves=Moves.PERSONAL, epochs=head_epochs), Phase(moves=Moves.SHARED))  # lines 5 and 6
    return PersonalLayers(names=personal_names, phases=phases)
