"""What every peer trains, read from the files of `export_workload`: photos, orders, first weights, and one local epoch.

It runs in the peers' environments, on torch, numpy and the standard library. The step is that of
`benchmarks.training_limit` (channels_last, fused SGD, photos scaled in long rows), so that no peer has a slower one.

Shapes: B batch, H height, W width, C channels, K classes, R = W·C values of a row of pixels.
"""

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.networks import chain_network, pilot_network, record_first_step

NETWORKS = {"pilot": pilot_network, "chain": chain_network}
TEST_BATCH = 250
WORKERS = 2  # as the limit has, however many cores there are


@dataclass(frozen=True, kw_only=True, eq=False)
class ExportedWorkload:
    """One federation. A *slot* is a place in a round's cohort; rounds count from 1.

    Attributes:
        network: The network's name.
        photos: The folder of the prepared photos.
        image_size: Side of the photos in pixels.
        num_stores: Stores of the federation.
        photos_per_store: Training photos of each store.
        batch_size: Photos per step.
        client_lr: Learning rate.
        num_test: Photos of the central test (0: none).
        mean: Of the channels, for scaling.
        std: Of the channels, for scaling.
        cohorts: Store numbers [rounds, slots].
        rows: Rows of the photos, in the order of training [rounds, slots, photos per store].
        weights: The first weights by name.
    """

    network: str
    photos: Path
    image_size: int
    num_stores: int
    photos_per_store: int
    batch_size: int
    client_lr: float
    num_test: int
    mean: Sequence[float]
    std: Sequence[float]
    cohorts: NDArray[np.int64]
    rows: NDArray[np.int64]
    weights: dict[str, Tensor]

    @classmethod
    def load(cls, folder: Path) -> "ExportedWorkload":
        """Read it from a folder."""
        settings = json.loads((folder / "workload.json").read_text(encoding="utf-8"))
        settings["photos"] = Path(settings["photos"])
        arrays = np.load(folder / "weights.npz")
        return cls(
            **settings, cohorts=np.load(folder / "cohorts.npy"), rows=np.load(folder / "rows.npy"),
            weights={name: torch.from_numpy(arrays[name]) for name in arrays.files},
        )  # fmt: skip

    @property
    def num_rounds(self) -> int:
        """The number of rounds."""
        return len(self.cohorts)

    @property
    def cohort_size(self) -> int:
        """The number of stores that train in a round."""
        return int(self.cohorts.shape[1])

    def build(self) -> nn.Module:
        """Build the network with the first weights, in channels_last."""
        module = NETWORKS[self.network]()
        module.load_state_dict(self.weights)
        record_first_step(module)
        return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    @cached_property
    def train(self) -> tuple[Tensor, Tensor]:
        """All stores' images uint8 [N, H, W, C] and labels int64 [N], memory-mapped."""
        return self._map("train")

    @cached_property
    def test(self) -> tuple[Tensor, Tensor]:
        """The test images uint8 [N, H, W, C] and labels int64 [N], memory-mapped."""
        return self._map("test")

    def _map(self, part: str) -> tuple[Tensor, Tensor]:
        images, labels = (np.load(self.photos / f"{part}_{kind}.npy", mmap_mode="c") for kind in ("images", "labels"))
        return torch.from_numpy(images), torch.from_numpy(labels)

    @cached_property
    def _scale(self) -> tuple[Tensor, Tensor]:
        mean_R, std_R = (torch.tensor(values).repeat(self.image_size) for values in (self.mean, self.std))
        return 1 / (255 * std_R), -mean_R / std_R

    def pixels(self, images_BHWC: Tensor) -> Tensor:
        """Return the network's input, float32 [B, C, H, W] in channels_last, from uint8 images."""
        batch, height, width, channels = images_BHWC.shape
        scale_R, shift_R = self._scale
        rows_BHR = images_BHWC.view(batch, height, width * channels).float()
        return torch.addcmul(shift_R, rows_BHR, scale_R).view(batch, height, width, channels).permute(0, 3, 1, 2)


class LocalTrainer:
    """One worker's network and optimizer, which train any store.

    Args:
        workload: What to train.
    """

    def __init__(self, workload: ExportedWorkload) -> None:
        self.workload = workload
        self.module = workload.build()
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=workload.client_lr, fused=True)

    def fit(self, round: int, slot: int) -> float:
        """Train one epoch from the module's current weights, and return the mean loss (nats) of its steps."""
        self.module.train()
        images, labels = self.workload.train
        rows = torch.from_numpy(self.workload.rows[round - 1, slot])
        loss_sum = torch.zeros((), dtype=torch.float64)
        for chosen in rows.split(self.workload.batch_size):
            loss = F.cross_entropy(self.module(self.workload.pixels(images[chosen])), labels[chosen])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss_sum += loss.detach().double() * len(chosen)
        return loss_sum.item() / len(rows)


def accuracy(workload: ExportedWorkload, module: nn.Module) -> float:
    """Return the fraction of the test photos that are classified correctly."""
    module.eval()
    images, labels = workload.test
    num_correct = 0
    with torch.inference_mode():
        for rows in torch.arange(workload.num_test).split(TEST_BATCH):
            logits_BK = module(workload.pixels(images[rows]))
            num_correct += int((logits_BK.argmax(1) == labels[rows]).sum())
    return num_correct / workload.num_test


class RunFigures:
    """Collects a run's figures, in the form that `benchmarks.training_limit` prints."""

    def __init__(self) -> None:
        self.train_loss: list[float] = []
        self.test_accuracy: list[float] = []
        self.ended: list[float] = []
        self.started = time.monotonic()

    def start(self) -> None:
        """Call when the first round begins."""
        self.started = time.monotonic()

    def end_round(self, train_loss: float, test_accuracy: float | None) -> None:
        """Call at the end of each round."""
        self.train_loss.append(train_loss)
        if test_accuracy is not None:
            self.test_accuracy.append(test_accuracy)
        self.ended.append(time.monotonic())

    def to_dict(self) -> dict[str, Any]:
        """Return the figures; seconds are those of all rounds but the first, or of the only round."""
        times = self.ended if len(self.ended) > 1 else [self.started, *self.ended]
        figures = {"train_loss": self.train_loss, "round_seconds": [b - a for a, b in itertools.pairwise(times)]}
        return figures | ({"test_accuracy": self.test_accuracy} if self.test_accuracy else {})
