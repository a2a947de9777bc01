"""The acceptance benchmark: 81 products, 8 unequal stores, 30 rounds; is the accuracy where it must be?

    python -m benchmarks.acceptance --seed 0 --seed 1 --seed 2      simulated
    python -m benchmarks.acceptance --seed 0 --deployed             one server and 8 client processes

Runs are kept below --work, and one that was interrupted goes on where it was. Prints a line of JSON per run; exit code
1 where a run lies outside the band.
"""

import argparse
import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from fedshelf.tracking.queries import run_summary

PHOTOS = Path(__file__).resolve().parents[1].parent / "shared" / "data"
BAND = (0.37, 0.43)  # accuracy on the official test photos after the last round
HALFWAY = 0.30  # least accuracy by round 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, action="append", help="split and training (repeat for several)")
    parser.add_argument("--deployed", action="store_true", help="real processes instead of a simulation")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of a simulation")
    parser.add_argument("--photos", type=Path, default=PHOTOS, help="folder with groceries-128.tar.gz and splits/")
    parser.add_argument("--work", type=Path, default=Path("runs") / "acceptance", help="where photos and runs go")
    parser.add_argument("--write", action="store_true", help="write the section into benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    records = [_run(arguments, seed) for seed in arguments.seed or [0]]
    if arguments.write:
        _write(records, arguments.deployed)
    sys.exit(0 if all(record["inside_band"] for record in records) else 1)


def _write(records: Sequence[Mapping[str, Any]], deployed: bool) -> None:
    columns = ["seed", "accuracy %", "by round 15 %", "inside the band", "SHA-256 of the model"]
    rows = [
        [
            str(r["seed"]), f"{r['accuracy']:.2%}", f"{r['best_by_round_15']:.2%}",
            "yes" if r["inside_band"] else "**no**", f"`{r['model_sha256'][:16]}`",
        ]
        for r in records
    ]  # fmt: skip
    how = "deployed: one server and 8 client processes" if deployed else "simulated"
    text = (
        f"{results.table(columns, rows)}\n\nThe band: {BAND[0]:.0%} to {BAND[1]:.0%} of 81 classes after 30 rounds of "
        f"2 local epochs over 8 stores (Dirichlet 0.3), at least {HALFWAY:.0%} by round 15; {how}."
    )
    seeds = " ".join(f"--seed {record['seed']}" for record in records)
    flag = " --deployed" if deployed else ""
    section = "acceptance, deployed" if deployed else "acceptance"
    results.write(section, text, f"python -m benchmarks.acceptance {seeds}{flag}")


def simulate(
    work: Path, photos: Path, seed: int, run_dir: Path, flags: Sequence[str] = (), *, workers: int,
    stores: Path | None = None,
) -> Path:  # fmt: skip
    """Simulate the benchmark with more flags (over `stores` in place of its eight); an interrupted run goes on. Returns
    its directory."""
    folder = stores_of(work, photos, seed) if stores is None else stores
    command = ["simulate", "--data-dir", str(folder), "--workers", str(workers), *_common(work, seed, run_dir), *flags]
    _fedshelf(command)
    return run_dir


def _run(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    run_dir = arguments.work / f"{'deployed' if arguments.deployed else 'simulated'}-{seed}"
    started = time.monotonic()
    if arguments.deployed:
        stores = sorted(stores_of(arguments.work, arguments.photos, seed).iterdir())
        _deploy(_common(arguments.work, seed, run_dir), stores, arguments.work)
    else:
        simulate(arguments.work, arguments.photos, seed, run_dir, workers=arguments.workers)
    return _report(run_dir, seed, time.monotonic() - started)


def _common(work: Path, seed: int, run_dir: Path) -> list[str]:
    test = str(work / "groceries-128" / "test")
    return ["--test-dir", test, "--rounds", "30", "--seed", str(seed), "--val-fraction", "0", "--run-dir", str(run_dir)]


def stores_of(work: Path, photos: Path, seed: int, *, split: str = "dirichlet") -> Path:
    """The photos dealt to 8 stores, made if they are not there; by another `split` than the benchmark's, too."""
    pack, stores = _unpack(photos, work), work / (f"stores-{seed}" if split == "dirichlet" else f"{split}-{seed}")
    if not stores.is_dir():
        dealt = photos / "splits" / f"{split}-8-seed{seed}.csv"
        _fedshelf(["data", "partition", str(pack), "--out", str(stores), "--assignment", str(dealt)])
    return stores


def _unpack(folder: Path, work: Path) -> Path:
    pack, packed = work / "groceries-128", folder / "groceries-128.tar.gz"
    if not pack.is_dir():
        if not packed.is_file():
            raise SystemExit(f"there is no '{packed}': give the folder that holds the photos with --photos")
        work.mkdir(parents=True, exist_ok=True)
        with tarfile.open(packed) as archive, tempfile.TemporaryDirectory(dir=work) as fresh:
            archive.extractall(fresh, filter="data")
            (Path(fresh) / "groceries-128").rename(pack)
    return pack


def _report(run_dir: Path, seed: int, seconds: float) -> dict[str, Any]:
    rounds = run_summary(run_dir).rounds
    halfway, last = (max((r.central_accuracy or 0.0) for r in rounds[:15]), rounds[-1].central_accuracy or 0.0)
    inside = BAND[0] <= last <= BAND[1] and halfway >= HALFWAY
    weights = (run_dir / "model" / "model.safetensors").read_bytes()
    record = {
        "run": run_dir.name, "seed": seed, "accuracy": last, "best_by_round_15": halfway, "inside_band": inside,
        "seconds": round(seconds, 1), "model_sha256": hashlib.sha256(weights).hexdigest(),
    }  # fmt: skip
    print(json.dumps(record), flush=True)
    return record


def _deploy(server: Sequence[str], stores: Sequence[Path], work: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with contextlib.ExitStack() as clients:
        for store in stores:
            command = [
                sys.executable,
                "-m",
                "fedshelf",
                "client",
                "--data-dir",
                str(store),
                "--server-address",
                address,
            ]
            log = clients.enter_context((work / f"{store.name}.log").open("wb"))
            client = subprocess.Popen(command, env=_environment(work), stdout=log, stderr=log)
            clients.callback(client.wait)
            clients.callback(client.terminate)
        _fedshelf(["server", "--address", address, "--min-clients", str(len(stores)), *server], work)


def _fedshelf(arguments: Sequence[str], work: Path | None = None) -> None:
    command = [sys.executable, "-m", "fedshelf", *arguments]
    subprocess.run(command, env=_environment(work) if work else None, check=True, stdout=sys.stderr)


def _environment(work: Path) -> dict[str, str]:
    return {**os.environ, "FEDSHELF_HOME": str(work / "home")}


if __name__ == "__main__":
    main()
