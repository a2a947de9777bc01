"""Writes a workload as plain files, so that a peer can do the same work without FedShelf."""

import json
from pathlib import Path

import numpy as np
import torch

from benchmarks.workloads import MEAN, STD, Workload


def export(workload: Workload, photos: Path, folder: Path) -> None:
    """Write what `benchmarks.peers.exported_workload.ExportedWorkload` reads.

    Args:
        workload: What to train.
        photos: The folder of its prepared photos, which are not copied.
        folder: An existing folder for the files.
    """
    number = {store: i for i, store in enumerate(workload.stores)}
    cohorts = [workload.cohort(number) for number in range(1, workload.num_rounds + 1)]
    rows = [
        [number[store] * workload.photos_per_store + workload.order(row + 1, store) for store in cohort]
        for row, cohort in enumerate(cohorts)
    ]
    np.save(folder / "cohorts.npy", np.array([[number[store] for store in cohort] for cohort in cohorts]))
    np.save(folder / "rows.npy", torch.stack([torch.stack(each) for each in rows]).numpy())
    weights = {name: value.numpy() for name, value in workload.build().state_dict().items()}
    np.savez(folder / "weights.npz", **weights)
    shared = ("image_size", "num_stores", "photos_per_store", "batch_size", "client_lr", "num_test")
    settings = {
        **{name: getattr(workload, name) for name in shared},
        "network": workload.name,
        "photos": str(photos.absolute()),
        "mean": MEAN,
        "std": STD,
    }
    (folder / "workload.json").write_text(json.dumps(settings), encoding="utf-8")
