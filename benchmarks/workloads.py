"""What is measured: the exact work of *pilot* and *chain*, the same for FedShelf and for the plain loops.

Both train without augmentation, with plain SGD (no momentum, no weight decay, no label smoothing, no clipping) at a
constant rate. A store's photos are shuffled afresh each round by the key (seed, round, store, "shuffle"), a cohort is
drawn by (seed, round, "cohort-0"), so that every implementation takes the same steps in the same order.

Training amplifies roundings: in *pilot*, adding up the stores' changes in float32 in another order moves losses by
1e-3 within five rounds, and so do two threads instead of one. Whoever wants to agree to 1e-4 trains each store on one
thread and adds up in float64. (Even so one value in 10^5 may round the other way in *chain*, whose weights of 1/50 are
no power of two; at a rate of 0.02 that stays below 1e-5, at 0.05 it grows to 4e-5.)

The networks stand in `networks.py`, which needs nothing of FedShelf.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.networks import NUM_CLASSES as NUM_CLASSES
from benchmarks.networks import chain_network, note_first_step, pilot_network
from fedshelf.core.rng import Rng
from fedshelf.scheduling import cohort

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One federation to train. Every store holds `photos_per_store` photos, so all weights are equal.

    `num_test` photos are scored centrally after each round (0: none).
    """

    name: str
    network: Callable[[], nn.Module]
    num_parameters: int
    image_size: int
    num_stores: int
    photos_per_store: int
    cohort_size: int
    num_rounds: int
    batch_size: int
    client_lr: float
    num_test: int
    seed: int = 0

    @property
    def stores(self) -> tuple[str, ...]:
        """Names, sorted; store number i holds the i-th run of `photos_per_store` photos."""
        return tuple(f"store-{i:04d}" for i in range(self.num_stores))

    def build(self) -> nn.Module:
        """The network with the weights that everybody starts from; notes when its first training step begins."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            module = self.network()
        note_first_step(module)
        return module

    def cohort(self, round: int) -> tuple[str, ...]:
        """The stores that train in `round` (1 is the first), sorted."""
        return cohort.draw(self.stores, self.cohort_size, Rng(self.seed).fork(round=round, purpose="cohort-0"))

    def order(self, round: int, store: str) -> Tensor:
        """The order [photos_per_store] in which a store goes through its photos in `round`."""
        generator = Rng(self.seed).fork(round=round, client=store, purpose="shuffle").torch()
        return torch.randperm(self.photos_per_store, generator=generator)


PILOT = Workload(
    name="pilot", network=pilot_network, num_parameters=701_515, image_size=64, num_stores=8, photos_per_store=330,
    cohort_size=8, num_rounds=5, batch_size=32, client_lr=0.05, num_test=1_000,
)  # fmt: skip
CHAIN = Workload(
    name="chain", network=chain_network, num_parameters=67_659, image_size=32, num_stores=1_000, photos_per_store=20,
    cohort_size=50, num_rounds=20, batch_size=10, client_lr=0.02, num_test=0,
)  # fmt: skip
WORKLOADS = {workload.name: workload for workload in (PILOT, CHAIN)}
