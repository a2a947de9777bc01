"""A simulation of a stateful algorithm, in this process or as a program that can be killed:

python -m tests.unit.simulate.stateful RUN_DIR NUM_WORKERS
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedshelf.algorithms import registry
from fedshelf.algorithms.fedavg import FedAvg
from fedshelf.config.schema import RunConfig
from fedshelf.core.events import RunStatus
from fedshelf.core.messages import Broadcast, Upload
from fedshelf.core.ports import MetricSink
from fedshelf.core.state import ClientState
from fedshelf.data.photo_set import PhotoSet
from fedshelf.simulate.engine import simulate_in_memory
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.training.trainer import Trainer

SIZE, NUM_ROUNDS = 16, 6
CLASSES = ("apple", "milk", "tea")


@dataclass(frozen=True, slots=True)
class Halves(FedAvg):
    """Sends half of what is due and remembers the rest: error feedback for the simplest lossy codec there is."""

    def client_round(self, broadcast: Broadcast, state: ClientState, trainer: Trainer) -> tuple[Upload, ClientState]:
        upload = trainer.upload(broadcast)
        due = upload.delta + state.algorithm["rest"] if state.algorithm else upload.delta
        sent = due / 2
        return replace(upload, vectors={**upload.vectors, "delta": sent}), ClientState(algorithm={"rest": due - sent})


def network(num_classes: int) -> nn.Module:
    """Large enough that its vectors travel as files."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 16), nn.ReLU(), nn.Linear(16, num_classes))


def simulate(
    run_dir: Path, *, workers: int, threads: int = 1, watchers: tuple[MetricSink, ...] = ()
) -> tuple[RunStatus, RunDirectory]:  # fmt: skip
    """Six rounds, in each of which three of five stores take part. `registry` has the algorithm under another name."""
    rng = np.random.default_rng(0)
    stores = {
        name: PhotoSet(rng.integers(0, 256, (8, SIZE, SIZE, 3), dtype=np.uint8), rng.integers(0, 3, 8))
        for name in "abcde"
    }
    config = RunConfig(
        rounds=NUM_ROUNDS, fraction=0.6, local_epochs=1, batch_size=4, image_size=SIZE, lr_schedule="constant",
        val_fraction=0.0, device="cpu", workers=workers, threads=threads, run_dir=run_dir,
    )  # fmt: skip
    return simulate_in_memory(
        config, stores=stores, test=None, class_names=CLASSES, model=network, watchers=watchers
    )  # fmt: skip


def use_halves() -> None:
    """Let `fedavg` be the stateful algorithm in this process, and in those that it forks."""
    registry.ALGORITHMS["fedavg"] = f"{__name__}:Halves"


if __name__ == "__main__":
    torch.set_num_threads(1)
    use_halves()
    simulate(Path(sys.argv[1]), workers=int(sys.argv[2]))
