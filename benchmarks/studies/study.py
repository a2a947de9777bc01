"""Studies: tables over simulations of the acceptance benchmark with other flags.

Every finished experiment is one record in `records.jsonl`, under a key that says what was run; all studies that need
it read it there. An interrupted simulation resumes from its folder below --work. To run an experiment again, delete its
line.
"""

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from benchmarks import acceptance, photos
from benchmarks.records import RecordFile
from fedshelf.tracking.queries import RunSummary, run_summary

RECORDS = RecordFile(Path(__file__).with_name("records.jsonl"))
SEEDS = (0, 1, 2)
EIGHT, ALL_IN_ONE, EACH_ALONE, HONEST = "eight", "all-in-one", "each-alone", "honest"
NUM_ATTACKERS = 2
"""How many stores attack where any do: the first ones, sorted by name."""
EQUALLY_FAST = ("--slowdowns", "1")
"""Flags of plain FedAvg in all studies: with a virtual clock, one record serves them all."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One way to train.

    Attributes:
        name: Its name in tables.
        flags: Flags in addition to the benchmark's.
        split: How the photos are dealt to 8 stores: dirichlet, assortment or iid.
        stores: What it trains over: the split's `EIGHT`, `ALL_IN_ONE`, `EACH_ALONE` (a run for each store) or the
            `HONEST` ones.
    """

    name: str
    flags: Sequence[str] = ()
    split: str = "dirichlet"
    stores: str = EIGHT

    @property
    def is_federated(self) -> bool:
        """Whether stores exchange models over the network."""
        return self.stores == EIGHT

    def key(self, seed: int) -> str:
        """Return the key of its record: everything that decides the result."""
        return "_".join([self.split, self.stores, *(flag.removeprefix("--") for flag in self.flags), f"seed_{seed}"])


@dataclass(frozen=True, kw_only=True)
class Result:
    """One experiment on one seed.

    Attributes:
        name: The experiment's name.
        seed: Seed of the split and of the training.
        accuracies: After each round, on the official test photos (the mean if there were several runs).
        validation: After each round, on the photos that the stores hold out, if they do.
        num_bytes: Payload bytes of all clients, both ways, up to that round.
        bytes_up: Of these, the bytes that clients sent; empty in records made before it was kept.
        virtual_seconds: Virtual time up to that round.
        stores: By store, what was compared after the last round: the accuracies of `local`, `global` and
            `personalized`, and which was `best`.
    """

    name: str
    seed: int
    accuracies: Sequence[float | None]
    validation: Sequence[float | None]
    num_bytes: Sequence[int]
    bytes_up: Sequence[int] = ()
    virtual_seconds: Sequence[float]
    stores: Mapping[str, Mapping[str, float | str | None]] = field(default_factory=dict)

    @property
    def final_accuracy(self) -> float:
        """The accuracy after the last round."""
        return self.accuracies[-1] or 0.0

    def round_reaching(self, accuracy: float) -> int | None:
        """Return the first round with that accuracy."""
        return next((i for i, value in enumerate(self.accuracies, 1) if value is not None and value >= accuracy), None)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A table over experiments.

    Attributes:
        name: The name of the command and of the section in RESULTS.md.
        help: What it compares.
        experiments: What it runs.
        report: Makes the section's text.
        draw: Draws its figures and returns the Markdown that shows them.
        summary: Makes the object that `--json` prints.
    """

    name: str
    help: str
    experiments: Sequence[Experiment]
    report: Callable[[Sequence[Result]], str]
    draw: Callable[[Sequence[Result]], str] = lambda results: ""
    summary: Callable[[Sequence[Result]], Mapping[str, float]] = lambda results: {
        name: statistics.fmean(result.final_accuracy for result in of) for name, of in by_name(results).items()
    }


def results_of(
    study: Study, work: Path, photos_folder: Path, *, seeds: Sequence[int] = SEEDS, only: Sequence[str] = (),
    workers: int = 2, recorded: bool = False,
) -> list[Result]:  # fmt: skip
    """Read the results of a study's experiments, and run those that have no record.

    Args:
        study: The study.
        work: The folder for unpacked photos, stores and runs.
        photos_folder: The folder that holds the groceries-128 pack and `splits/`.
        seeds: Seeds of the splits and of the training.
        only: Names of the experiments; empty for all.
        workers: Worker processes.
        recorded: Run nothing.
    """
    known = RECORDS.load()
    return [
        run(work, photos_folder, experiment, seed, workers)
        for seed in seeds
        for experiment in study.experiments
        if (not only or experiment.name in only) and (not recorded or experiment.key(seed) in known)
    ]


def run(work: Path, photos_folder: Path, experiment: Experiment, seed: int, workers: int) -> Result:
    """Read an experiment's record, or simulate it and add that."""
    key = experiment.key(seed)
    record = RECORDS.load().get(key)
    if record is None:
        runs = []
        for stores in _store_folders(work, photos_folder, experiment, seed):
            run_dir, flags = work / key / stores.name, list(experiment.flags)
            if not experiment.is_federated:  # tested on the products that its stores do not sell, too
                tested = photos.unpack(photos_folder, work) / "test"
                flags += ["--catalogue", str(photos.write_catalogue(work / "catalogue.txt", tested))]
            acceptance.simulate(work, photos_folder, seed, run_dir, flags, workers=workers, stores=stores)
            runs.append(_result(experiment.name, seed, run_summary(run_dir)))
        record = asdict(_mean(runs))
        RECORDS.add(key, record)
    return replace(Result(**record), name=experiment.name)


def by_name(found: Iterable[Result]) -> dict[str, list[Result]]:
    """Group results by experiment, in their order."""
    grouped: dict[str, list[Result]] = {}
    for result in found:
        grouped.setdefault(result.name, []).append(result)
    return grouped


def percent(values: Sequence[float]) -> str:
    """Format mean and standard deviation over seeds in percent."""
    percents = [100 * value for value in values]
    return f"{statistics.fmean(percents):.1f}" + (f" ± {statistics.stdev(percents):.1f}" if len(values) > 1 else "")


def _result(name: str, seed: int, summary: RunSummary) -> Result:
    rounds = summary.rounds
    return Result(
        name=name, seed=seed, accuracies=[each.central_accuracy for each in rounds],
        validation=[each.accuracy for each in rounds],
        num_bytes=list(itertools.accumulate(each.bytes_up + each.bytes_down for each in rounds)),
        bytes_up=list(itertools.accumulate(each.bytes_up for each in rounds)),
        virtual_seconds=list(itertools.accumulate(each.virtual_seconds or 0.0 for each in rounds)),
        stores={store["client"]: store for store in summary.to_record()["stores"]},
    )  # fmt: skip


def _mean(runs: Sequence[Result]) -> Result:
    """Several runs as one: accuracies are means, and no bytes travel."""
    if len(runs) == 1:
        return runs[0]
    accuracies = zip(*(result.accuracies for result in runs), strict=True)
    return replace(
        runs[0], accuracies=[statistics.fmean(accuracy or 0.0 for accuracy in each) for each in accuracies],
        num_bytes=[0] * len(runs[0].num_bytes), bytes_up=[0] * len(runs[0].bytes_up),
    )  # fmt: skip


def _store_folders(work: Path, photos_folder: Path, experiment: Experiment, seed: int) -> list[Path]:
    """The folders of stores that an experiment trains over, one per run."""
    split = acceptance.partition(work, photos_folder, seed, split=experiment.split)
    if experiment.is_federated:
        return [split]
    dealt = sorted(split.iterdir())
    groups = {
        ALL_IN_ONE: {"all": {"all": photos.unpack(photos_folder, work) / "train"}},
        EACH_ALONE: {store.name: {store.name: store} for store in dealt},
        HONEST: {"honest": {store.name: store for store in dealt[NUM_ATTACKERS:]}},
    }[experiment.stores]
    root = work / f"{experiment.stores}-{experiment.split}-{seed}"
    return [photos.link_stores(root / group, stores) for group, stores in groups.items()]
