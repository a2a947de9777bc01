"""*scale*: a simulation of 10,000 stores on one machine, and the cost of a round as a federation grows.

    python -m benchmarks.scale POINT        # what is measured: one run; POINT is a `Point` as JSON

Each point is a run in its own process, with two workers. Its photos are noise, drawn when they are needed: it does not
matter here what is learned.
"""

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import results
from benchmarks.measure import Program, measure
from benchmarks.networks import NUM_CLASSES, chain_network
from benchmarks.records import RecordFile
from fedshelf.app.photos import StorePhotos
from fedshelf.app.setup import OpenedSetup
from fedshelf.app.store_sales import StoreSales
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import DataError
from fedshelf.core.events import Event, RoundFinished, RoundStarted
from fedshelf.core.messages import ClassFolder
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.photo_set import PhotoSet
from fedshelf.simulate.engine import simulate_stores

IMAGE_SIZE, PHOTOS_PER_STORE, BATCH_SIZE = 32, 20, 10
NUM_WORKERS = 2
LIMIT_GIB = 4.0


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run.

    Attributes:
        clients: Stores of the federation.
        cohort: Stores that train in a round.
        width: Channels of the network's first layer; 16 is that of *chain*.
        rounds: Rounds.
    """

    clients: int = 1_000
    cohort: int = 20
    width: int = 16
    rounds: int = 10


LARGE = Point(clients=10_000, cohort=100, rounds=100)
CURVES: Mapping[str, Sequence[Point]] = {
    "clients": [Point(clients=clients) for clients in (100, 1_000, 10_000)],
    "cohort": [Point(cohort=cohort) for cohort in (10, 30, 100, 300)],
    "parameters": [Point(width=width) for width in (8, 16, 32, 64)],
}


@dataclass(frozen=True)
class DrawnStores:
    """Stores whose photos are noise, seeded by the store's name."""

    count: int
    has_test: bool = False
    features_folder: Path | None = None

    def names(self) -> tuple[str, ...]:
        return tuple(f"store-{i:05d}" for i in range(self.count))

    def classes(self, name: str) -> tuple[ClassFolder, ...]:
        return CLASSES

    def num_photos(self, name: str, catalogue: Catalogue) -> tuple[int, int]:
        return PHOTOS_PER_STORE, 0

    def photos(self, name: str, opened: OpenedSetup) -> StorePhotos:
        rng = np.random.default_rng(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
        images = rng.integers(0, 256, (PHOTOS_PER_STORE, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        labels = rng.integers(0, NUM_CLASSES, PHOTOS_PER_STORE)
        return StorePhotos(train=PhotoSet(images, labels), validation=PhotoSet(images[:0], labels[:0]))

    def test(self, opened: OpenedSetup, store: str = "", sales: StoreSales | None = None) -> PhotoSet:
        raise DataError("drawn stores have no test photos")


CLASSES = tuple(ClassFolder(leaf=f"class-{i:02d}", path=f"class-{i:02d}") for i in range(NUM_CLASSES))


class Times:
    """Records the times of a run.

    Attributes:
        start: Seconds from the start of the process to the first round.
        rounds: Seconds of each round.
        cpu: Processor time of all processes at the end of each round.
    """

    def __init__(self) -> None:
        self.start: float | None = None
        self.rounds: list[float] = []
        self.cpu: list[float] = []

    def emit(self, event: Event) -> None:
        here = psutil.Process()
        if isinstance(event, RoundStarted) and self.start is None:
            self.start = time.time() - here.create_time()
        elif isinstance(event, RoundFinished):
            self.rounds.append(event.seconds)
            used = [process.cpu_times() for process in (here, *here.children(recursive=True))]
            self.cpu.append(sum(times.user + times.system for times in used))


def run(point: Point) -> dict[str, Any]:
    """Simulate; return the start of the first round, the median seconds and the mean CPU time of the other rounds."""
    times, network = Times(), partial(chain_network, point.width)
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            rounds=point.rounds, fraction=point.cohort / point.clients, min_clients=1, local_epochs=1,
            batch_size=BATCH_SIZE, image_size=IMAGE_SIZE, client_lr=0.01, lr_schedule="constant", warmup_rounds=0,
            augment=False, val_fraction=0.0, threads=1, workers=NUM_WORKERS, device="cpu", run_dir=Path(folder) / "run",
        )  # fmt: skip
        simulate_stores(config, DrawnStores(point.clients), model=network, watchers=(times,))
    return {
        "parameters": sum(p.numel() for p in network().parameters()), "start": times.start,
        "round": float(np.median(times.rounds[1:])), "round_cpu": float(np.diff(times.cpu).mean()),
    }  # fmt: skip


def measured(point: Point, work: Path) -> dict[str, Any]:
    """Measure a point, or return the figures of an earlier call."""
    file, key = RecordFile(work / "scale.jsonl"), json.dumps(asdict(point))
    if key not in file.load():
        sample = measure(Program(name="scale", command=("benchmarks.scale", key)))
        totals = {"seconds": sample.seconds, "cpu_seconds": sample.cpu_seconds, "peak_mb": sample.peak_mb}
        file.add(key, {**sample.figures, **totals})
        print(f"{key}: {file.load()[key]}", file=sys.stderr, flush=True)
    return file.load()[key]


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the slope of a line fitted on a log-log scale: 1 is proportional, 0 is constant."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def report(work: Path) -> str:
    """Measure all points that are not measured yet, and return the section of RESULTS.md.

    Args:
        work: The folder for what was measured.
    """
    default = Point()
    text = (
        f"Each point is a separate run with two workers: {default.clients:,} stores, {default.cohort} per round and "
        f"the network of *chain* unless stated otherwise; {PHOTOS_PER_STORE} photos of {IMAGE_SIZE} px per store. "
        "Exponents are fitted on a log-log scale: 1 is proportional to the size, 0 is independent of it."
    )
    return "\n\n".join([_large_table(measured(LARGE, work)), _curve_table(work), text])


def _large_table(large: Mapping[str, Any]) -> str:
    gib = large["peak_mb"] * 1e6 / 2**30
    columns = ["stores", "per round", "rounds", "wall s", "CPU s", "s/round", "first round at s", "peak RSS GiB"]
    row = [
        f"{LARGE.clients:,}", str(LARGE.cohort), str(LARGE.rounds), f"{large['seconds']:.0f}",
        f"{large['cpu_seconds']:.0f}", f"{large['round']:.2f}", f"{large['start']:.1f}", f"{gib:.2f}",
    ]  # fmt: skip
    verdict = "below" if gib < LIMIT_GIB else "**above**"
    return f"{results.table(columns, [row])}\n\nPeak memory is {verdict} the {LIMIT_GIB:g} GiB allowed."


def _curve_table(work: Path) -> str:
    rows = []
    for axis, points in CURVES.items():
        found = [measured(point, work) for point in points]
        sizes = [
            f["parameters"] if axis == "parameters" else asdict(p)[axis] for f, p in zip(found, points, strict=True)
        ]
        curves = [[figures[key] for figures in found] for key in ("round", "round_cpu")]
        text = ", ".join(f"{size:,}: {wall:.3f} ({cpu:.3f})" for size, wall, cpu in zip(sizes, *curves, strict=True))
        rows.append([axis, *(f"{exponent(sizes, curve):+.2f}" for curve in curves), text])
    columns = ["what grows", "exponent, wall", "exponent, CPU", "wall (CPU) seconds of a round, by size"]
    return results.table(columns, rows)


if __name__ == "__main__":
    print(json.dumps(run(Point(**json.loads(sys.argv[1])))))
