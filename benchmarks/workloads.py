"""The exact work of *pilot* and *chain*, the same for FedShelf and for the plain loops.

Both train without augmentation, with plain SGD (no momentum, no weight decay, no label smoothing, no clipping) at a
constant rate. A store's photos are shuffled again in each round by the key (seed, round, store, "shuffle"), and a
cohort is drawn by (seed, round, "cohort-0"), so that every implementation takes the same steps in the same order.

Training amplifies rounding errors: in *pilot*, summing the stores' changes in float32 in another order moves losses by
1e-3 within five rounds, and so do two threads in place of one. To agree to 1e-4, train each store on one thread and sum
in float64. (Even then one value in 10^5 may round the other way in *chain*, whose weights of 1/50 are not powers of
two; at a rate of 0.02 the difference stays below 1e-5, at 0.05 it grows to 4e-5.)

The networks are in `networks.py`, which imports nothing of FedShelf.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.networks import NUM_CLASSES as NUM_CLASSES
from benchmarks.networks import chain_network, pilot_network, record_first_step
from fedshelf.core.rng import Rng
from fedshelf.scheduling import cohort

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One federation to train. Every store holds as many photos, so all weights are equal.

    Attributes:
        name: The benchmark's name.
        network: Makes the network.
        num_parameters: Values of the network.
        image_size: Side of the photos in pixels.
        num_stores: Stores of the federation.
        photos_per_store: Training photos of each store.
        cohort_size: Stores that train in a round.
        num_rounds: Rounds.
        batch_size: Photos per step.
        client_lr: Learning rate.
        num_test: Photos of the central test after each round (0: none).
        seed: Seed of the weights, cohorts and orders.
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
        """The names, sorted; store number i holds the i-th run of `photos_per_store` photos."""
        return tuple(f"store-{i:04d}" for i in range(self.num_stores))

    def build(self) -> nn.Module:
        """Build the network with the initial weights; it records when its first training step begins."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            module = self.network()
        record_first_step(module)
        return module

    def cohort(self, round: int) -> tuple[str, ...]:
        """Return the stores that train in `round` (1 is the first), sorted."""
        return cohort.draw(self.stores, self.cohort_size, Rng(self.seed).fork(round=round, purpose="cohort-0"))

    def order(self, round: int, store: str) -> Tensor:
        """Return the order [photos_per_store] in which a store trains on its photos in `round`."""
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
