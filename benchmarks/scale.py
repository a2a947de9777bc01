"""How far a simulation goes: 10,000 stores on one machine, and what a round costs as a federation grows.

    python -m benchmarks.scale --work FOLDER --write

Each point is a run in a process of its own, with two workers, on photos that are drawn when they are needed (noise:
what is learned does not matter here). What was measured is kept below --work: an interrupted call goes on.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import psutil
from torch import nn

from benchmarks import measure, results
from fedshelf.app.components import OpenedSetup, StorePhotos
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import DataError
from fedshelf.core.events import Event, RoundFinished, RoundStarted
from fedshelf.core.messages import ClassFolder
from fedshelf.data.dataset import PhotoSet
from fedshelf.simulate.engine import simulate_stores

NUM_CLASSES, IMAGE_SIZE, PHOTOS_PER_STORE, BATCH_SIZE = 43, 32, 20, 10
NUM_WORKERS = 2
LIMIT_GIB = 4.0


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run. `width` is that of the network's first layer: 16 is *chain*'s."""

    clients: int = 1_000
    cohort: int = 20
    width: int = 16
    rounds: int = 10


GREAT = Point(clients=10_000, cohort=100, rounds=100)
CURVES: Mapping[str, Sequence[Point]] = {
    "clients": [Point(clients=clients) for clients in (100, 1_000, 10_000)],
    "cohort": [Point(cohort=cohort) for cohort in (10, 30, 100, 300)],
    "parameters": [Point(width=width) for width in (8, 16, 32, 64)],
}


@dataclass(frozen=True)
class Network:
    """*chain*'s network, as wide as wanted."""

    width: int

    def __call__(self, num_classes: int) -> nn.Module:
        layers: list[nn.Module] = []
        channels = [3, self.width, 2 * self.width, 4 * self.width]
        for before, after in pairwise(channels):
            layers += [nn.Conv2d(before, after, 3, 1, 1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * 16, num_classes))


@dataclass(frozen=True)
class DrawnStores:
    """Stores whose photos are noise, drawn from their name."""

    count: int
    has_test: bool = False

    def names(self) -> tuple[str, ...]:
        return tuple(f"store-{i:05d}" for i in range(self.count))

    def classes(self, name: str) -> tuple[ClassFolder, ...]:
        return CLASSES

    def num_photos(self, name: str) -> int:
        return PHOTOS_PER_STORE

    def photos(self, name: str, opened: OpenedSetup) -> StorePhotos:
        rng = np.random.default_rng(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
        images = rng.integers(0, 256, (PHOTOS_PER_STORE, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        labels = rng.integers(0, NUM_CLASSES, PHOTOS_PER_STORE)
        return StorePhotos(train=PhotoSet(images, labels), validation=PhotoSet(images[:0], labels[:0]))

    def test(self, opened: OpenedSetup) -> PhotoSet:
        raise DataError("drawn stores have no test photos")


CLASSES = tuple(ClassFolder(leaf=f"class-{i:02d}", path=f"class-{i:02d}") for i in range(NUM_CLASSES))


class Times:
    """When the first round began, seconds after the process did, how long each round took, and what processor time all
    processes had used at its end."""

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
    """Simulate: the first round's start, the median of the other rounds' seconds, the mean of their processor time."""
    times, network = Times(), Network(point.width)
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            rounds=point.rounds, fraction=point.cohort / point.clients, min_clients=1, local_epochs=1,
            batch_size=BATCH_SIZE, image_size=IMAGE_SIZE, client_lr=0.01, lr_schedule="constant", warmup_rounds=0,
            augment=False, val_fraction=0.0, threads=1, workers=NUM_WORKERS, device="cpu", run_dir=Path(folder) / "run",
        )  # fmt: skip
        simulate_stores(config, DrawnStores(point.clients), model=network, watchers=(times,))
    return {
        "parameters": sum(p.numel() for p in network(NUM_CLASSES).parameters()), "start": times.start,
        "round": float(np.median(times.rounds[1:])), "round_cpu": float(np.diff(times.cpu).mean()),
    }  # fmt: skip


def measured(point: Point, work: Path) -> dict[str, Any]:
    """The figures of `point`: those of an earlier call, or new ones."""
    kept = work / "scale.json"
    known: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    name = json.dumps(asdict(point))
    if name not in known:
        sample = measure.measure(["benchmarks.scale", "--point", name])
        figures = sample.figures
        known[name] = {
            **{key: figures[key] for key in ("parameters", "start", "round", "round_cpu")},
            "seconds": sample.seconds, "cpu_seconds": sample.cpu_seconds, "peak_mb": sample.peak_mb,
        }  # fmt: skip
        work.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(".tmp")
        temporary.write_text(json.dumps(known, indent=1), encoding="utf-8")
        temporary.replace(kept)
        print(f"{name}: {known[name]}", file=sys.stderr, flush=True)
    found: dict[str, Any] = known[name]
    return found


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of a straight line through the points on a log-log scale: 1 is proportional, 0 is constant."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def report(work: Path) -> str:
    """Measure everything that is not yet measured; the tables."""
    basis = Point()
    text = (
        f"Each point is a run of its own with two workers: {basis.clients:,} stores, {basis.cohort} a round, the "
        f"network of *chain* where nothing else is said; {PHOTOS_PER_STORE} photos of {IMAGE_SIZE} px a store. "
        "Exponents are fitted on a log-log scale: 1 is proportional to the size, 0 does not depend on it."
    )
    return "\n\n".join([_great_table(measured(GREAT, work)), _curve_table(work), text])


def _great_table(great: Mapping[str, Any]) -> str:
    gib = great["peak_mb"] * 1e6 / 2**30
    columns = ["stores", "a round", "rounds", "wall s", "CPU s", "s/round", "first round at s", "peak RSS GiB"]
    row = [
        f"{GREAT.clients:,}", str(GREAT.cohort), str(GREAT.rounds), f"{great['seconds']:.0f}",
        f"{great['cpu_seconds']:.0f}", f"{great['round']:.2f}", f"{great['start']:.1f}", f"{gib:.2f}",
    ]  # fmt: skip
    verdict = "below" if gib < LIMIT_GIB else "**above**"
    return f"{results.table(columns, [row])}\n\nPeak memory is {verdict} the {LIMIT_GIB:g} GiB that it may take."


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
    columns = ["what grows", "exponent, wall", "exponent, CPU", "wall (CPU) seconds of a round by size"]
    return results.table(columns, rows)


def main() -> int:
    """The exit code: 0 measured, 1 failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the section into benchmarks/RESULTS.md")
    parser.add_argument(
        "--work", type=Path, default=Path(platformdirs.user_cache_dir("fedshelf", appauthor=False)) / "benchmarks",
        help="folder for what was measured (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--point", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(run(Point(**json.loads(arguments.point)))))
        return 0
    try:
        text = report(arguments.work)
    except measure.MeasurementError as error:
        print(f"scale: {error}", file=sys.stderr)
        return 1
    print(text)
    if arguments.write:
        results.write("scale", text, "python -m benchmarks.scale")
    return 0


if __name__ == "__main__":
    sys.exit(main())
