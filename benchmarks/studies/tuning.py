"""*tuning*: FedAvgM's momentum, and the adaptive optimizers' rates and taus, by accuracy on held-out photos."""

from collections.abc import Sequence

from benchmarks import results
from benchmarks.studies import study
from benchmarks.studies.study import Experiment, Result, Study

GRID = {
    "fedadam": (
        (0.001, 0.0001), (0.003, 0.001), (0.01, 0.001), (0.03, 0.001), (0.01, 0.01), (0.03, 0.01), (0.1, 0.01),
        (0.3, 0.03),
    ),
    "fedyogi": ((0.01, 0.001), (0.03, 0.01), (0.1, 0.01), (0.3, 0.03)),
    "fedadagrad": ((0.01, 0.001), (0.03, 0.01), (0.1, 0.01), (0.3, 0.03)),
}  # fmt: skip
"""Pairs of rate and tau, by algorithm."""
MOMENTA = (0.3, 0.5, 0.7, 0.8)
SHORT = ("--rounds", "15", "--val-fraction", "0.1")
EXPERIMENTS = (
    Experiment(name="fedavg", flags=SHORT),
    *(
        Experiment(
            name=f"fedavgm, momentum {momentum}",
            flags=("--algorithm", "fedavgm", "--server-momentum", str(momentum), *SHORT),
        )
        for momentum in MOMENTA
    ),
    *(
        Experiment(
            name=f"{algorithm}, rate {rate}, tau {tau}",
            flags=("--algorithm", algorithm, "--server-lr", str(rate), "--server-tau", str(tau), *SHORT),
        )
        for algorithm, pairs in GRID.items()
        for rate, tau in pairs
    ),
)


def report(found: Sequence[Result]) -> str:
    """One row per setting: accuracy on the stores' held-out photos after the last round."""
    rows = [
        [name, study.percent([result.validation[-1] or 0.0 for result in of]), ", ".join(str(r.seed) for r in of)]
        for name, of in study.by_name(found).items()
    ]
    return (
        results.table(["", "accuracy on held-out photos %", "seeds"], rows)
        + "\n\nThe acceptance benchmark with 15 rounds and 10 % of each store's photos held out."
    )


STUDY = Study(name="tuning", help="Tune the server optimizers on 15 rounds.", experiments=EXPERIMENTS, report=report)
