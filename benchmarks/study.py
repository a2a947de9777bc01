"""Runs of the acceptance benchmark under other flags, each kept as one record: what the tables of algorithms,
personalization, robustness and unequal machines are made of.

What came of a run is kept in `studies/`, under what it was a run of, and read by every study that has use for it; a run
that was interrupted goes on where it was, below --work. To run something anew, remove its record.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from benchmarks import acceptance, results
from fedshelf.tracking.queries import RunSummary, run_summary

RECORDS = Path(__file__).with_name("studies")
EIGHT, ALL_IN_ONE, EACH_ALONE, HONEST = "eight", "all-in-one", "each-alone", "honest"
NUM_HOSTILE = 2
"""How many stores attack where any do: the first, in the order of names."""
CLOCKED = ("--speeds", "1")
"""Of plain FedAvg in all studies: alike stores, on a virtual clock, so that one record serves them all."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to train.

    Attributes:
        name: as in tables.
        flags: beside those of the benchmark.
        split: how the photos are dealt to 8 stores: dirichlet, assortment or iid.
        stores: what it trains over: the split's eight, `ALL_IN_ONE`, `EACH_ALONE` (a run for each) or the
            `HONEST` ones.
    """

    name: str
    flags: Sequence[str] = ()
    split: str = "dirichlet"
    stores: str = EIGHT

    @property
    def travels(self) -> bool:
        """Whether it moves bytes between stores."""
        return self.stores == EIGHT

    @property
    def key(self) -> str:
        """What its runs are kept under: everything that makes them what they are, but for the seed."""
        return "_".join([self.split, self.stores, *(flag.removeprefix("--") for flag in self.flags)])


@dataclass(frozen=True, kw_only=True)
class Record:
    """One contender on one seed.

    Attributes:
        accuracies: after each round, on the official test photos (of several runs, the mean).
        validation: after each round, on the photos that the stores hold out, if they do.
        num_bytes: payload of all clients, both ways, up to that round.
        virtual_seconds: up to that round.
        stores: of the comparison after the last round, by store: accuracies of `local`, `global`, `personalized`, and
            which was `best`.
    """

    name: str
    seed: int
    accuracies: Sequence[float | None]
    validation: Sequence[float | None]
    num_bytes: Sequence[int]
    virtual_seconds: Sequence[float]
    stores: Mapping[str, Mapping[str, float | str | None]] = field(default_factory=dict)

    @property
    def final(self) -> float:
        return self.accuracies[-1] or 0.0

    def reached(self, accuracy: float) -> int | None:
        """The first round with that accuracy."""
        return next((i for i, value in enumerate(self.accuracies, 1) if value is not None and value >= accuracy), None)


def run(work: Path, photos: Path, contender: Contender, seed: int, workers: int) -> Record:
    """Simulate one contender, or read what it came to."""
    path = _record_path(contender, seed)
    if not path.exists():
        folders = _folders(work, photos, contender, seed)
        records = [_simulate(work, photos, contender, seed, workers, folder) for folder in folders]
        RECORDS.mkdir(exist_ok=True)
        path.write_text(json.dumps(asdict(_mean(records))) + "\n", encoding="utf-8")
    return replace(Record(**json.loads(path.read_text(encoding="utf-8"))), name=contender.name)


def main(
    description: str | None, contenders: Sequence[Contender], section: str, report: Callable[[Sequence[Record]], str],
    draw: Callable[[Sequence[Record]], str] = lambda records: "",
) -> None:  # fmt: skip
    """The command line of a study: run what is asked for, print the table, and write it if that is wanted."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [contender.name for contender in contenders]
    parser.add_argument("--seed", type=int, action="append", help="split and training (default: 0, 1 and 2)")
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help="only these rows")
    parser.add_argument("--workers", type=int, default=2, help="worker processes")
    parser.add_argument("--photos", type=Path, default=acceptance.PHOTOS, help="folder with groceries-128.tar.gz")
    parser.add_argument("--work", type=Path, default=Path("runs") / "studies", help="where photos and runs go")
    parser.add_argument("--kept", action="store_true", help="run nothing: the table of what is there")
    parser.add_argument("--write", action="store_true", help="write the section into benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    wanted = [c for c in contenders if not arguments.only or c.name in arguments.only]
    records = [
        run(arguments.work, arguments.photos, contender, seed, arguments.workers)
        for seed in arguments.seed or [0, 1, 2]
        for contender in wanted
        if not arguments.kept or _record_path(contender, seed).exists()
    ]
    text = report(records)
    print(text)
    if arguments.write:
        results.write(
            section,
            "\n\n".join(filter(None, [text, draw(records)])),
            f"python -m benchmarks.{section.replace(' ', '_')}",
        )


def by_name(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each contender, in their order."""
    grouped: dict[str, list[Record]] = {}
    for record in records:
        grouped.setdefault(record.name, []).append(record)
    return grouped


def percent(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    return results.spread([100 * value for value in values])


def _simulate(
    work: Path, photos: Path, contender: Contender, seed: int, workers: int, folder: Path | None
) -> Record:  # fmt: skip
    run_dir = work / _record_path(contender, seed).stem / (folder.name if folder else "run")
    stores = folder or acceptance.stores_of(work, photos, seed, split=contender.split)
    flags = [*contender.flags, *(("--catalogue", str(_catalogue(work))) if folder else ())]
    acceptance.simulate(work, photos, seed, run_dir, flags, workers=workers, stores=stores)
    return _record(contender.name, seed, run_summary(run_dir))


def _record(name: str, seed: int, summary: RunSummary) -> Record:
    num_bytes, seconds = 0, 0.0
    sums: list[int] = []
    clock: list[float] = []
    for each in summary.rounds:
        num_bytes += each.bytes_up + each.bytes_down
        seconds += each.virtual_seconds or 0.0
        sums.append(num_bytes)
        clock.append(seconds)
    return Record(
        name=name, seed=seed, accuracies=[each.central_accuracy for each in summary.rounds],
        validation=[each.accuracy for each in summary.rounds], num_bytes=sums, virtual_seconds=clock,
        stores={store["client"]: store for store in summary.to_record()["stores"]},
    )  # fmt: skip


def _mean(records: Sequence[Record]) -> Record:
    """Several runs as one: accuracies are means."""
    if len(records) == 1:
        return records[0]
    return replace(
        records[0],
        accuracies=[
            statistics.fmean(accuracy or 0.0 for accuracy in each)
            for each in zip(*(record.accuracies for record in records), strict=True)
        ],
        num_bytes=[0] * len(records[0].num_bytes),
    )  # fmt: skip


def _folders(work: Path, photos: Path, contender: Contender, seed: int) -> list[Path | None]:
    """The folders of stores that a contender trains over, one run each; None is the split's own."""
    if contender.travels:
        return [None]
    dealt = sorted(acceptance.stores_of(work, photos, seed, split=contender.split).iterdir())
    groups = {
        ALL_IN_ONE: {"all": {"all": work / "groceries-128" / "train"}},
        EACH_ALONE: {store.name: {store.name: store} for store in dealt},
        HONEST: {"honest": {store.name: store for store in dealt[NUM_HOSTILE:]}},
    }[contender.stores]
    folders: list[Path | None] = []
    for group, stores in groups.items():
        folder = work / f"{contender.stores}-{contender.split}-{seed}" / group
        folder.mkdir(parents=True, exist_ok=True)
        for store, photos_of_it in stores.items():
            if not (folder / store).exists():
                (folder / store).symlink_to(photos_of_it.resolve(), target_is_directory=True)
        folders.append(folder)
    return folders


def _catalogue(work: Path) -> Path:
    """All products: who trains on a part of the photos is tested on what it does not sell, too."""
    path, tested = work / "catalogue.txt", work / "groceries-128" / "test"
    path.write_text("".join(f"{name}\n" for name in sorted({photo.parent.name for photo in tested.rglob("*.*")})))
    return path


def _record_path(contender: Contender, seed: int) -> Path:
    return RECORDS / f"{contender.key}.{seed}.json"
