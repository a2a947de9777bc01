"""*tuning*: FedAvgM's momentum, rates and taus of the adaptive optimizers, on half as many rounds, by the photos that
the stores hold out.

python -m benchmarks.tuning --seed 0
"""

from collections.abc import Sequence

from benchmarks import results, study
from benchmarks.study import Contender, Record

GRID = {
    "fedadam": (
        (0.001, 0.0001), (0.003, 0.001), (0.01, 0.001), (0.03, 0.001), (0.01, 0.01), (0.03, 0.01), (0.1, 0.01),
        (0.3, 0.03),
    ),
    "fedyogi": ((0.01, 0.001), (0.03, 0.01), (0.1, 0.01), (0.3, 0.03)),
    "fedadagrad": ((0.01, 0.001), (0.03, 0.01), (0.1, 0.01), (0.3, 0.03)),
}  # fmt: skip
MOMENTA = (0.3, 0.5, 0.7, 0.8)
SHORT = ("--rounds", "15", "--val-fraction", "0.1")
CONTENDERS = (
    Contender(name="fedavg", flags=SHORT),
    *(
        Contender(
            name=f"fedavgm, momentum {momentum}",
            flags=("--algorithm", "fedavgm", "--server-momentum", str(momentum), *SHORT),
        )
        for momentum in MOMENTA
    ),
    *(
        Contender(
            name=f"{algorithm}, rate {rate}, tau {tau}",
            flags=("--algorithm", algorithm, "--server-lr", str(rate), "--server-tau", str(tau), *SHORT),
        )
        for algorithm, pairs in GRID.items()
        for rate, tau in pairs
    ),
)


def report(records: Sequence[Record]) -> str:
    """One row per setting: accuracy on held-out photos of the stores after the last round."""
    rows = [
        [name, study.percent([record.validation[-1] or 0.0 for record in of]), ", ".join(str(r.seed) for r in of)]
        for name, of in study.by_name(records).items()
    ]
    return (
        results.table(["", "accuracy on held-out photos %", "seeds"], rows)
        + "\n\nThe acceptance benchmark with 15 rounds and 10 % of each store's photos held out."
    )


if __name__ == "__main__":
    study.main(__doc__, CONTENDERS, "tuning", report)
