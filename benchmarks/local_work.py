"""*local work*: machines that differ in speed, on the acceptance benchmark; accuracy against virtual time.

    python -m benchmarks.local_work                  # fixed, cut and dynamic work, three seeds; goes on where it was
    python -m benchmarks.local_work --seed 0 --only dynamic

Every run is kept below --work, with one record; one that was interrupted goes on.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import acceptance, results
from fedshelf.tracking.queries import run_summary

SPEEDS = "1,1,2,4"  # over eight stores: twice
TARGET = 0.37
CONTENDERS: Mapping[str, Sequence[str]] = {
    "fixed": (),
    "cut": ("--local-work", "cut"),
    "dynamic": ("--local-work", "dynamic"),
}
"""Flags beside those of the benchmark."""
POINTS = 8  # of the curves, over the time that the shortest run takes


@dataclass(frozen=True, kw_only=True)
class Record:
    """One contender on one seed: after each round the accuracy on the official test photos, and virtual seconds up to
    there."""

    name: str
    seed: int
    accuracies: Sequence[float]
    seconds: Sequence[float]

    def at(self, time: float) -> float:
        """The accuracy of the model that is there at `time`."""
        return max(((s, a) for s, a in zip(self.seconds, self.accuracies, strict=True) if s <= time), default=(0, 0))[1]

    def time_to(self, accuracy: float) -> float | None:
        """When a model first has it."""
        return next((s for s, a in zip(self.seconds, self.accuracies, strict=True) if a >= accuracy), None)


def run(work: Path, photos: Path, name: str, seed: int, workers: int) -> Record:
    """Simulate one contender, or read what it came to."""
    path = work / f"{name}-{seed}.json"
    if not path.exists():
        flags = ["--speeds", SPEEDS, *CONTENDERS[name]]
        run_dir = acceptance.simulate(work, photos, seed, work / f"{name}-{seed}", flags, workers=workers)
        rounds = run_summary(run_dir).rounds
        record = Record(
            name=name, seed=seed, accuracies=[each.central_accuracy or 0.0 for each in rounds],
            seconds=list(itertools.accumulate(each.virtual_seconds or 0.0 for each in rounds)),
        )  # fmt: skip
        path.write_text(json.dumps(asdict(record)), encoding="utf-8")
    return Record(**json.loads(path.read_text(encoding="utf-8")))


def table(records: Sequence[Record]) -> str:
    """One row per contender: means and standard deviations over seeds."""
    columns = ["local work", "accuracy %", f"virtual seconds to {TARGET:.0%}", "virtual seconds in all", "seeds"]
    rows = []
    for name in dict.fromkeys(record.name for record in records):
        of = [record for record in records if record.name == name]
        times = [time for record in of if (time := record.time_to(TARGET)) is not None]
        rows.append(
            [
                name, results.spread([100 * record.accuracies[-1] for record in of]),
                results.spread(times) if len(times) == len(of) else f"missed by {len(of) - len(times)}",
                results.spread([record.seconds[-1] for record in of]), str(len(of)),
            ]
        )  # fmt: skip
    return results.table(columns, rows)


def curves(records: Sequence[Record]) -> str:
    """Mean accuracy over seeds at the same virtual times."""
    end = min(record.seconds[-1] for record in records)
    times = [end * i / POINTS for i in range(1, POINTS + 1)]
    rows = [
        [name, *(f"{statistics.fmean(100 * r.at(time) for r in records if r.name == name):.1f}" for time in times)]
        for name in dict.fromkeys(record.name for record in records)
    ]
    return results.table(["accuracy % at", *(f"{time:.0f} s" for time in times)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, action="append", help="split and training (default: 0, 1 and 2)")
    parser.add_argument("--only", action="append", choices=list(CONTENDERS), metavar="NAME", help="only these rows")
    parser.add_argument("--workers", type=int, default=2, help="worker processes")
    parser.add_argument("--photos", type=Path, default=acceptance.PHOTOS, help="folder with groceries-128.tar.gz")
    parser.add_argument("--work", type=Path, default=Path("runs") / "local-work", help="where photos and runs go")
    parser.add_argument("--write", action="store_true", help="write the section into benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    records = [
        run(arguments.work, arguments.photos, name, seed, arguments.workers)
        for seed in arguments.seed or [0, 1, 2]
        for name in arguments.only or CONTENDERS
    ]
    text = (
        f"{table(records)}\n\n{curves(records)}\n\nThe acceptance benchmark (81 products, 8 stores, 30 rounds of 2 "
        f"local epochs) with machines of slowness {SPEEDS} in virtual time; mean and standard deviation over seeds. "
        "`cut` takes work from machines that are slower than the median; `dynamic` deals the same work by speed."
    )
    print(text)
    if arguments.write:
        results.write("local work", text, "python -m benchmarks.local_work")


if __name__ == "__main__":
    main()
