"""The acceptance benchmark: 81 products, 8 unequal stores, 30 rounds of 2 local epochs."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import photos, results
from benchmarks.fedshelf_cli import FedShelfCli
from fedshelf.tracking.queries import run_summary

BAND = (0.37, 0.43)  # accuracy on the official test photos after the last round
HALFWAY = 0.30  # accuracy to reach by round 15


def simulate(
    work: Path, photos_folder: Path, seed: int, run_dir: Path, flags: Sequence[str] = (), *, workers: int,
    stores: Path | None = None,
) -> Path:  # fmt: skip
    """Simulate the benchmark; an interrupted run resumes.

    Args:
        work: The folder for unpacked photos and stores.
        photos_folder: The folder that holds the groceries-128 pack and `splits/`.
        seed: Seed of the split and of the training.
        run_dir: The run's folder.
        flags: More flags; they win over the benchmark's own.
        workers: Worker processes.
        stores: The folder of stores to train over in place of the benchmark's eight.

    Returns:
        The run's folder.
    """
    folder = stores or partition(work, photos_folder, seed)
    command = ["simulate", "--data-dir", str(folder), "--workers", str(workers), *run_flags(work, photos_folder, seed)]
    FedShelfCli(home=work / "home").run(*command, "--run-dir", str(run_dir), *flags)
    return run_dir


def run(work: Path, photos_folder: Path, seed: int, *, deployed: bool, workers: int) -> dict[str, Any]:
    """Run the benchmark and return its figures; an interrupted run resumes.

    Args:
        work: The folder for unpacked photos, stores and runs.
        photos_folder: The folder that holds the groceries-128 pack and `splits/`.
        seed: Seed of the split and of the training.
        deployed: Run a server and 8 client processes instead of a simulation.
        workers: Worker processes of a simulation.
    """
    run_dir = work / f"{'deployed' if deployed else 'simulated'}-{seed}"
    started = time.monotonic()
    if deployed:
        stores = sorted(partition(work, photos_folder, seed).iterdir())
        FedShelfCli(home=work / "home").deploy(stores, *run_flags(work, photos_folder, seed), "--run-dir", str(run_dir))
    else:
        simulate(work, photos_folder, seed, run_dir, workers=workers)
    rounds = run_summary(run_dir).rounds
    halfway, last = (max((r.central_accuracy or 0.0) for r in rounds[:15]), rounds[-1].central_accuracy or 0.0)
    weights = (run_dir / "model" / "model.safetensors").read_bytes()
    record = {
        "run": run_dir.name, "seed": seed, "accuracy": last, "best_by_round_15": halfway,
        "inside_band": BAND[0] <= last <= BAND[1] and halfway >= HALFWAY,
        "seconds": round(time.monotonic() - started, 1), "model_sha256": hashlib.sha256(weights).hexdigest(),
    }  # fmt: skip
    print(json.dumps(record), flush=True)
    return record


def report(records: Sequence[Mapping[str, Any]], *, deployed: bool) -> str:
    """Return the section of RESULTS.md."""
    columns = ["seed", "accuracy %", "by round 15 %", "inside the band", "SHA-256 of the model"]
    rows = [
        [
            str(r["seed"]), f"{r['accuracy']:.2%}", f"{r['best_by_round_15']:.2%}",
            "yes" if r["inside_band"] else "**no**", f"`{r['model_sha256'][:16]}`",
        ]
        for r in records
    ]  # fmt: skip
    how = "Deployed: one server and 8 client processes." if deployed else "Simulated."
    return (
        f"{results.table(columns, rows)}\n\nThe band: {BAND[0]:.0%} to {BAND[1]:.0%} of 81 classes after 30 rounds of "
        f"2 local epochs over 8 stores (Dirichlet 0.3), and at least {HALFWAY:.0%} by round 15. {how}"
    )


def run_flags(work: Path, photos_folder: Path, seed: int) -> list[str]:
    """Return the flags of a run, for `simulate` and `server` alike."""
    test = photos.unpack(photos_folder, work) / "test"
    return ["--test-dir", str(test), "--rounds", "30", "--seed", str(seed), "--val-fraction", "0"]


def partition(work: Path, photos_folder: Path, seed: int, *, split: str = "dirichlet") -> Path:
    """Return the folder of the 8 stores, made now if it is not there.

    Args:
        work: The folder for unpacked photos and stores.
        photos_folder: The folder that holds the groceries-128 pack and `splits/`.
        seed: The split's seed.
        split: How the photos are dealt: dirichlet (the benchmark's), assortment or iid.
    """
    stores = work / (f"stores-{seed}" if split == "dirichlet" else f"{split}-{seed}")
    if not stores.is_dir():
        pack, dealt = photos.unpack(photos_folder, work), photos_folder / "splits" / f"{split}-8-seed{seed}.csv"
        FedShelfCli(home=work / "home").run(
            "data", "partition", str(pack), "--out", str(stores), "--assignment", str(dealt)
        )
    return stores
