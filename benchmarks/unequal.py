"""*unequal*: stores of different speed, in virtual time: asynchronous rounds, and local work fitted to the machine.

python -m benchmarks.unequal --seed 0
"""

import statistics
from collections.abc import Mapping, Sequence

from benchmarks import curves, results, study
from benchmarks.study import Contender, Record

EQUAL, ONE_IN_FOUR, STEPS = "1", "1,1,1,5", "1,1,2,4"
# A version of fedbuff takes 4 of 8 uploads, one of fedasync 1: 60 and 240 are as many local epochs in all as 30
# rounds of FedAvg. Stores that do not wait are done with those sooner: 85 and 328 versions take about as long where
# stores are alike, 120 half as long where one in four is 5 times slower; 80 rounds of fitted work as long at 1:1:2:4.
BUFFERED = ("--algorithm", "fedbuff", "--buffer-size", "4", "--test-every", "4")
MIXED = ("--algorithm", "fedasync", "--test-every", "8")
WAYS: Mapping[str, Sequence[str]] = {
    "FedAvg": (),
    "FedBuff, 60 versions": (*BUFFERED, "--rounds", "60"),
    "FedBuff, 85 versions": (*BUFFERED, "--rounds", "85"),
    "FedBuff, 120 versions": (*BUFFERED, "--rounds", "120"),
    "FedAsync, 240 versions": (*MIXED, "--rounds", "240"),
    "FedAsync, 328 versions": (*MIXED, "--rounds", "328"),
    "FedAvg, work cut": ("--local-work", "cut", "--work-norm", "none"),
    "FedAvg, work fitted": ("--local-work", "dynamic"),
    "FedAvg, work fitted, 80 rounds": ("--local-work", "dynamic", "--rounds", "80"),
}
PLACES = {
    "equal": (
        EQUAL,
        (
            "FedAvg", "FedBuff, 60 versions", "FedBuff, 85 versions", "FedAsync, 240 versions",
            "FedAsync, 328 versions",
        ),
    ),
    "one in four 5 × slower": (
        ONE_IN_FOUR, ("FedAvg", "FedBuff, 60 versions", "FedBuff, 120 versions", "FedAvg, work fitted")
    ),
    "speeds 1:1:2:4": (
        STEPS,
        (
            "FedAvg", "FedAvg, work cut", "FedAvg, work fitted", "FedAvg, work fitted, 80 rounds",
            "FedBuff, 120 versions",
        ),
    ),
}  # fmt: skip
CONTENDERS = tuple(
    Contender(name=f"{way}, {place}", flags=("--speeds", speeds, *WAYS[way]))
    for place, (speeds, ways) in PLACES.items()
    for way in ways
)
GRID = [step / 200 for step in range(1, 201)]
MOMENTS = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0)  # of the time that FedAvg takes


def report(records: Sequence[Record]) -> str:
    """A table per place: accuracy against virtual time, and when FedAvg's final accuracy is there."""
    found = study.by_name(records)
    parts = []
    for place, (_, ways) in PLACES.items():
        reference = found.get(f"FedAvg, {place}")
        if not reference:
            continue
        columns = [
            "",
            *(f"at {moment:.0%}" for moment in MOMENTS),
            "in the end %",
            "FedAvg's at",
            "ahead",
            "time",
            "seeds",
        ]
        rows = [_row(way, found[f"{way}, {place}"], reference) for way in ways if f"{way}, {place}" in found]
        parts.append(f"Stores: {place}.\n\n{results.table(columns, rows)}")
    parts.append(
        "The acceptance benchmark (8 stores, Dirichlet 0.3). Accuracies (%) are of the newest model at shares of the "
        "virtual time that 30 rounds of FedAvg take with such stores; *FedAvg's at*: the share after which the "
        "accuracy is there that FedAvg has in the end (mean over seeds; –: not by all); *ahead*: in how many of 200 "
        "moments of that time the mean accuracy is FedAvg's or more; *time*: when it ends."
    )
    return "\n\n".join(parts)


def draw(records: Sequence[Record]) -> str:
    """A figure per place: mean accuracy over virtual time."""
    found = study.by_name(records)
    images = []
    for place, (_, ways) in PLACES.items():
        reference = found.get(f"FedAvg, {place}")
        if not reference:
            continue
        lines = {
            way: [(100 * moment, 100 * accuracy) for moment, accuracy in _curve(found[f"{way}, {place}"], reference)]
            for way in ways
            if f"{way}, {place}" in found
        }
        name = "unequal-" + place.replace(" ", "-").replace(":", "-").replace("×", "times")
        images.append(curves.draw(name, f"Stores: {place}", "virtual time, % of what 30 rounds of FedAvg take", lines))
    return "\n\n".join(images)


def _curve(records: Sequence[Record], reference: Sequence[Record]) -> list[tuple[float, float]]:
    """Shares of the time that the reference takes, and the mean accuracy there; to the first record's end."""
    ends = _ends(reference)
    known = [record for record in records if record.seed in ends]
    last = min(record.virtual_seconds[-1] / ends[record.seed] for record in known)
    return [(at, _mean_at(known, ends, at)) for at in GRID if at <= last + GRID[0]]


def _row(way: str, records: Sequence[Record], reference: Sequence[Record]) -> list[str]:
    ends, goals = _ends(reference), {record.seed: record.final for record in reference}
    known = [record for record in records if record.seed in ends]
    same = [record for record in reference if record.seed in {other.seed for other in known}]
    reached = [(record, record.reached(goals[record.seed])) for record in known]
    shares = [record.virtual_seconds[n - 1] / ends[record.seed] for record, n in reached if n is not None]
    ahead = sum(_mean_at(known, ends, at) >= _mean_at(same, ends, at) for at in GRID)
    return [
        way, *(f"{100 * _mean_at(known, ends, moment):.1f}" for moment in MOMENTS),
        study.percent([record.final for record in known]),
        f"{statistics.fmean(shares):.2f}" if len(shares) == len(known) else "–", f"{ahead} of {len(GRID)}",
        f"{statistics.fmean(record.virtual_seconds[-1] / ends[record.seed] for record in known):.2f}", str(len(known)),
    ]  # fmt: skip


def _ends(reference: Sequence[Record]) -> dict[int, float]:
    """By seed, how long the reference takes (virtual s)."""
    return {record.seed: record.virtual_seconds[-1] for record in reference}


def _mean_at(records: Sequence[Record], ends: Mapping[int, float], share: float) -> float:
    """Mean accuracy after that share of the reference's time."""
    return statistics.fmean(_accuracy_at(record, share * ends[record.seed]) for record in records)


def _accuracy_at(record: Record, seconds: float) -> float:
    """Of the model that was tested last at that moment."""
    pairs = zip(record.accuracies, record.virtual_seconds, strict=True)
    known = [accuracy for accuracy, at in pairs if accuracy is not None and at <= seconds + 1e-6]
    return known[-1] if known else 0.0


if __name__ == "__main__":
    study.main(__doc__, CONTENDERS, "unequal", report, draw)
