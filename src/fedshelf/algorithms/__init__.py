"""Federated algorithms: one paper, one file, both halves.

The classes exported here can be given to `fedshelf.Federation(algorithm=...)`.
"""

from fedshelf.algorithms.fedasync import FedAsync
from fedshelf.algorithms.fedavg import FedAvg
from fedshelf.algorithms.fedavgm import FedAvgM
from fedshelf.algorithms.fedbuff import FedBuff
from fedshelf.algorithms.fedopt import fedadagrad as FedAdagrad
from fedshelf.algorithms.fedopt import fedadam as FedAdam
from fedshelf.algorithms.fedopt import fedyogi as FedYogi
from fedshelf.algorithms.fedprox import FedProx
from fedshelf.algorithms.ridge import Ridge
from fedshelf.algorithms.scaffold import Scaffold

__all__ = [
    "FedAdagrad", "FedAdam", "FedAsync", "FedAvg", "FedAvgM", "FedBuff", "FedProx", "FedYogi", "Ridge", "Scaffold",
]  # fmt: skip
