"""*unequal*: stores of different speed, in virtual time: asynchronous rounds, and local work fitted to the machine."""

import statistics
from collections.abc import Mapping, Sequence

from benchmarks import plots, results
from benchmarks.studies import study
from benchmarks.studies.study import Experiment, Result, Study

# A version of FedBuff takes 4 of 8 uploads, one of FedAsync 1: 60 and 240 versions are as many local epochs as 30
# rounds of FedAvg. Stores that do not wait finish them sooner: 85 and 328 versions take about as long where stores are
# equally fast, 120 half as long where one in four is 5 times slower, and 80 rounds of fitted work as long at 1:1:2:4.
FEDBUFF = ("--algorithm", "fedbuff", "--buffer-size", "4", "--test-every", "4")
FEDASYNC = ("--algorithm", "fedasync", "--test-every", "8")
METHODS: Mapping[str, Sequence[str]] = {
    "FedAvg": (),
    "FedBuff, 60 versions": (*FEDBUFF, "--rounds", "60"),
    "FedBuff, 85 versions": (*FEDBUFF, "--rounds", "85"),
    "FedBuff, 120 versions": (*FEDBUFF, "--rounds", "120"),
    "FedAsync, 240 versions": (*FEDASYNC, "--rounds", "240"),
    "FedAsync, 328 versions": (*FEDASYNC, "--rounds", "328"),
    "FedAvg, work cut": ("--local-work", "cut", "--work-norm", "none"),
    "FedAvg, work fitted": ("--local-work", "dynamic"),
    "FedAvg, work fitted, 80 rounds": ("--local-work", "dynamic", "--rounds", "80"),
}
MACHINES = {
    "equal": (
        "1",
        ["FedAvg", "FedBuff, 60 versions", "FedBuff, 85 versions", "FedAsync, 240 versions", "FedAsync, 328 versions"],
    ),
    "one in four 5 × slower": (
        "1,1,1,5",
        ["FedAvg", "FedBuff, 60 versions", "FedBuff, 120 versions", "FedAvg, work fitted"],
    ),
    "slowdowns 1:1:2:4": (
        "1,1,2,4",
        [*(name for name in METHODS if name.startswith("FedAvg")), "FedBuff, 120 versions"],
    ),
}
"""The stores' slowdowns, and the methods compared with them."""
EXPERIMENTS = tuple(
    Experiment(name=f"{method}, {machines}", flags=("--slowdowns", slowdowns, *METHODS[method]))
    for machines, (slowdowns, methods) in MACHINES.items()
    for method in methods
)
GRID = [step / 200 for step in range(1, 201)]
MOMENTS = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0)  # shares of the time that FedAvg takes
COLUMNS = ["", *(f"at {moment:.0%}" for moment in MOMENTS), "final %", "reaches FedAvg at", "ahead", "ends at", "seeds"]


def report(found: Sequence[Result]) -> str:
    """A table per set of machines: accuracy against virtual time, and when FedAvg's final accuracy is reached."""
    parts = []
    for machines, grouped in _by_machines(found).items():
        rows = [_row(method, of, grouped["FedAvg"]) for method, of in grouped.items()]
        parts.append(f"Stores: {machines}.\n\n{results.table(COLUMNS, rows)}")
    parts.append(
        "The acceptance benchmark (8 stores, Dirichlet 0.3). Accuracies (%) are of the newest model, at shares of the "
        "virtual time that 30 rounds of FedAvg take with the same stores. *reaches FedAvg at*: the share at which "
        "FedAvg's final accuracy is reached (mean over seeds; –: not on all seeds); *ahead*: at how many of 200 "
        "moments of that time the mean accuracy is at least FedAvg's; *ends at*: the share at which the run ends."
    )
    return "\n\n".join(parts)


def draw(found: Sequence[Result]) -> str:
    """A figure per set of machines: mean accuracy over virtual time."""
    images = []
    for machines, grouped in _by_machines(found).items():
        curves = {
            method: [(100 * moment, 100 * accuracy) for moment, accuracy in _curve(of, grouped["FedAvg"])]
            for method, of in grouped.items()
        }
        name = "unequal-" + machines.replace(" ", "-").replace(":", "-").replace("×", "times")
        x_label = "virtual time, % of what 30 rounds of FedAvg take"
        images.append(plots.draw_curves(name, f"Stores: {machines}", x_label, curves))
    return "\n\n".join(images)


def _by_machines(found: Sequence[Result]) -> dict[str, dict[str, list[Result]]]:
    """The results by machines and method, of machines for which FedAvg was run."""
    grouped = study.by_name(found)
    by_machines = {
        machines: {method: grouped[f"{method}, {machines}"] for method in methods if f"{method}, {machines}" in grouped}
        for machines, (_, methods) in MACHINES.items()
    }
    return {machines: methods for machines, methods in by_machines.items() if "FedAvg" in methods}


def _curve(found: Sequence[Result], reference: Sequence[Result]) -> list[tuple[float, float]]:
    """Shares of the reference's time, and the mean accuracy there, up to the end of the first result."""
    ends = _ends(reference)
    known = [result for result in found if result.seed in ends]
    last = min(result.virtual_seconds[-1] / ends[result.seed] for result in known)
    return [(at, _mean_at(known, ends, at)) for at in GRID if at <= last + GRID[0]]


def _row(method: str, found: Sequence[Result], reference: Sequence[Result]) -> list[str]:
    ends, goals = _ends(reference), {result.seed: result.final_accuracy for result in reference}
    known = [result for result in found if result.seed in ends]
    same_seeds = [result for result in reference if result.seed in {other.seed for other in known}]
    reached = [(result, result.round_reaching(goals[result.seed])) for result in known]
    shares = [result.virtual_seconds[n - 1] / ends[result.seed] for result, n in reached if n is not None]
    ahead = sum(_mean_at(known, ends, at) >= _mean_at(same_seeds, ends, at) for at in GRID)
    return [
        method, *(f"{100 * _mean_at(known, ends, moment):.1f}" for moment in MOMENTS),
        study.percent([result.final_accuracy for result in known]),
        f"{statistics.fmean(shares):.2f}" if len(shares) == len(known) else "–", f"{ahead} of {len(GRID)}",
        f"{statistics.fmean(result.virtual_seconds[-1] / ends[result.seed] for result in known):.2f}", str(len(known)),
    ]  # fmt: skip


def _ends(reference: Sequence[Result]) -> dict[int, float]:
    """By seed, how long the reference takes (virtual s)."""
    return {result.seed: result.virtual_seconds[-1] for result in reference}


def _mean_at(found: Sequence[Result], ends: Mapping[int, float], share: float) -> float:
    """The mean accuracy after that share of the reference's time."""
    return statistics.fmean(_accuracy_at(result, share * ends[result.seed]) for result in found)


def _accuracy_at(result: Result, seconds: float) -> float:
    """The accuracy of the model that was tested last at that moment."""
    pairs = zip(result.accuracies, result.virtual_seconds, strict=True)
    known = [accuracy for accuracy, at in pairs if accuracy is not None and at <= seconds + 1e-6]
    return known[-1] if known else 0.0


STUDY = Study(
    name="unequal", help="Compare asynchronous rounds and fitted work on stores of different speed.",
    experiments=EXPERIMENTS, report=report, draw=draw,
)  # fmt: skip
