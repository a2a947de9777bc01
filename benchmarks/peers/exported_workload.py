"""What every peer trains, read from the files of `prepare`: photos, order, first weights, and one local epoch.

Runs in the peers' environments: torch, numpy and the standard library, nothing of FedShelf. The step is that of
`benchmarks.limits` (channels_last, fused SGD, photos scaled in long rows), so that no peer pays for a slower one.

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

from benchmarks.networks import chain_network, note_first_step, pilot_network

NETWORKS = {"pilot": pilot_network, "chain": chain_network}
TEST_BATCH = 250
WORKERS = 2  # as the limit has, however many cores there are


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """One federation. A *slot* is a place in a round's cohort; `round` counts from 1.

    Attributes:
        network: name of the network.
        photos: folder of the photos.
        cohorts: store numbers [rounds, slots].
        rows: the rows of the photos, in the order of training [rounds, slots, photos per store].
        weights: the first weights by name.
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
    def load(cls, folder: Path) -> "Job":
        facts = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        facts["photos"] = Path(facts["photos"])
        arrays = np.load(folder / "weights.npz")
        return cls(
            **facts, cohorts=np.load(folder / "cohorts.npy"), rows=np.load(folder / "rows.npy"),
            weights={name: torch.from_numpy(arrays[name]) for name in arrays.files},
        )  # fmt: skip

    @property
    def num_rounds(self) -> int:
        return len(self.cohorts)

    @property
    def cohort_size(self) -> int:
        return int(self.cohorts.shape[1])

    def build(self) -> nn.Module:
        """The network with the first weights, in channels_last."""
        module = NETWORKS[self.network]()
        module.load_state_dict(self.weights)
        note_first_step(module)
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
        """What the network takes, float32 [B, C, H, W] in channels_last, from uint8."""
        batch, height, width, channels = images_BHWC.shape
        scale_R, shift_R = self._scale
        rows_BHR = images_BHWC.view(batch, height, width * channels).float()
        return torch.addcmul(shift_R, rows_BHR, scale_R).view(batch, height, width, channels).permute(0, 3, 1, 2)


class Store:
    """One worker's network and optimizer; trains whichever store it is asked to."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.module = job.build()
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=job.client_lr, fused=True)

    def fit(self, round: int, slot: int) -> float:
        """One epoch from the module's present weights; the mean loss (nats) of the photos as they came by."""
        self.module.train()
        images, labels = self.job.train
        rows = torch.from_numpy(self.job.rows[round - 1, slot])
        loss_sum = torch.zeros((), dtype=torch.float64)
        for chosen in rows.split(self.job.batch_size):
            loss = F.cross_entropy(self.module(self.job.pixels(images[chosen])), labels[chosen])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss_sum += loss.detach().double() * len(chosen)
        return loss_sum.item() / len(rows)


def accuracy(job: Job, module: nn.Module) -> float:
    """The fraction of the test photos that are named right."""
    module.eval()
    images, labels = job.test
    num_correct = 0
    with torch.inference_mode():
        for rows in torch.arange(job.num_test).split(TEST_BATCH):
            logits_BK = module(job.pixels(images[rows]))
            num_correct += int((logits_BK.argmax(1) == labels[rows]).sum())
    return num_correct / job.num_test


class Report:
    """Gathers a run's figures; `figures` has the form that `benchmarks.limits` prints."""

    def __init__(self) -> None:
        self.train_loss: list[float] = []
        self.test_accuracy: list[float] = []
        self.ended: list[float] = []
        self.started = time.monotonic()

    def start(self) -> None:
        """The first round begins."""
        self.started = time.monotonic()

    def end_round(self, train_loss: float, test_accuracy: float | None) -> None:
        self.train_loss.append(train_loss)
        if test_accuracy is not None:
            self.test_accuracy.append(test_accuracy)
        self.ended.append(time.monotonic())

    def figures(self) -> dict[str, Any]:
        """Seconds are those of all rounds but the first, or of the only one."""
        marks = self.ended if len(self.ended) > 1 else [self.started, *self.ended]
        figures = {"train_loss": self.train_loss, "round_seconds": [b - a for a, b in itertools.pairwise(marks)]}
        return figures | ({"test_accuracy": self.test_accuracy} if self.test_accuracy else {})
