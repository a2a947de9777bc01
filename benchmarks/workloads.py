"""What is measured: the exact work of *pilot* and *chain*, the same for FedShelf and for the plain loops.

Both train without augmentation, with plain SGD (no momentum, no weight decay, no label smoothing, no clipping) at a
constant rate. A store's photos are shuffled afresh each round by the key (seed, round, store, "shuffle"), a cohort is
drawn by (seed, round, "cohort-0"), so that every implementation takes the same steps in the same order.

Training amplifies roundings: in *pilot*, adding up the stores' changes in float32 in another order moves losses by
1e-3 within five rounds, and so do two threads instead of one. Whoever wants to agree to 1e-4 trains each store on one
thread and adds up in float64. (Even so one value in 10^5 may round the other way in *chain*, whose weights of 1/50 are
no power of two; at a rate of 0.02 that stays below 1e-5, at 0.05 it grows to 4e-5.)

Shapes: B batch, C channels, H height, W width, K classes.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fedshelf.core.rng import Rng
from fedshelf.rounds import cohort

NUM_CLASSES = 43  # the groceries' coarse classes
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
GROUPS = 8
FIRST_STEP_FILE = "BENCHMARK_FIRST_STEP_FILE"


class ResidualBlock(nn.Module):
    """Basic block; where it halves the picture, the shortcut is a 1×1 convolution without normalization."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False),
            nn.GroupNorm(GROUPS, channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.GroupNorm(GROUPS, channels),
        )
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if stride > 1 else nn.Identity()
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.activation(self.body(x_BCHW) + self.shortcut(x_BCHW))
        return out


def pilot_network() -> nn.Module:
    """GroupNorm ResNet of 701,515 parameters for photos of 64 px."""
    channels = [(32, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1, bias=False),
        nn.GroupNorm(GROUPS, 32),
        nn.ReLU(inplace=True),
        *(ResidualBlock(*block) for block in channels),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, NUM_CLASSES),
    )


def chain_network() -> nn.Module:
    """CNN of 67,659 parameters for photos of 32 px: three times (3×3 convolution, ReLU, 2×2 pool), then linear."""
    layers: list[nn.Module] = []
    for in_channels, channels in [(3, 16), (16, 32), (32, 64)]:
        layers += [nn.Conv2d(in_channels, channels, 3, 1, 1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, NUM_CLASSES))


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
        _note_first_step(module)
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


def _note_first_step(module: nn.Module) -> None:
    """Where the environment names a file for it, append the time at which training first enters the network."""
    path = os.environ.get(FIRST_STEP_FILE)
    if path is None:
        return

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training:
            handle.remove()
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(f"{time.monotonic()}\n")

    handle = module.register_forward_pre_hook(note)
