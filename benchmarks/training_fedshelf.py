"""FedShelf's side of *pilot* and *chain*: its simulator with two workers, as a user would call it.

    python -m benchmarks.training_fedshelf pilot FOLDER

It prints one line of JSON with the same figures as `benchmarks.training_limit`. It is started for measuring, so it
imports nothing that it does not need.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from benchmarks import photos
from benchmarks.workloads import NUM_CLASSES, WORKLOADS, Workload
from fedshelf.config.schema import RunConfig
from fedshelf.data.photo_set import PhotoSet
from fedshelf.simulate.engine import simulate_in_memory
from fedshelf.tracking.queries import run_summary

NUM_WORKERS = 2


@dataclass(frozen=True)
class MakeModule:
    """Builds the workload's network; its number of classes is fixed."""

    workload: Workload

    def __call__(self, num_classes: int) -> nn.Module:
        if num_classes != NUM_CLASSES:
            raise ValueError(f"the workload has {NUM_CLASSES} classes, the run {num_classes}")
        return self.workload.build()


def config_of(workload: Workload, run_dir: Path) -> RunConfig:
    """Return the configuration: plain SGD at a constant rate, no augmentation, one thread per client."""
    return RunConfig(
        rounds=workload.num_rounds, fraction=workload.cohort_size / workload.num_stores,
        min_clients=workload.cohort_size, local_epochs=1, batch_size=workload.batch_size,
        image_size=workload.image_size, client_lr=workload.client_lr, lr_schedule="constant", warmup_rounds=0,
        momentum=0.0, weight_decay=0.0, label_smoothing=0.0, gradient_clip=0.0, augment=False, val_fraction=0.0,
        seed=workload.seed, threads=1, workers=NUM_WORKERS, device="cpu", run_dir=run_dir,
    )  # fmt: skip


def run(workload: Workload, folder: Path, run_dir: Path) -> dict[str, list[float]]:
    """Simulate, and return the figures of every round (accuracies are fractions, losses nats).

    Args:
        workload: What to train.
        folder: The folder of its prepared photos.
        run_dir: The folder of the run.
    """
    data = photos.load(folder)
    size = workload.photos_per_store
    stores = {
        name: PhotoSet(data.train_images[i * size : (i + 1) * size], data.train_labels[i * size : (i + 1) * size])
        for i, name in enumerate(workload.stores)
    }
    test = PhotoSet(data.test_images, data.test_labels) if workload.num_test else None
    names = tuple(f"class-{label:02d}" for label in range(NUM_CLASSES))  # sorted, so that labels keep their order
    simulate_in_memory(
        config_of(workload, run_dir), stores=stores, test=test, class_names=names, model=MakeModule(workload)
    )  # fmt: skip
    rounds = run_summary(run_dir).rounds
    figures: dict[str, list[float | None]] = {
        "train_loss": [each.train_loss for each in rounds],
        "round_seconds": [each.seconds for each in rounds[1:]],
        "test_accuracy": [each.central_accuracy for each in rounds if workload.num_test],
    }
    return {name: [value for value in values if value is not None] for name, values in figures.items()}


if __name__ == "__main__":
    name, photos_folder = sys.argv[1:]
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(run(WORKLOADS[name], Path(photos_folder), Path(temporary) / "run")))
