"""*algorithms*: every way to train, on the acceptance benchmark, between its two bounds: all photos in one place, and
each store alone.

    python -m benchmarks.algorithms                         # all, three seeds; takes hours, goes on where it was
    python -m benchmarks.algorithms --seed 0 --only FedAvg --only "SCAFFOLD, option II"
"""

import statistics
from collections.abc import Sequence

from benchmarks import results, study, unequal
from benchmarks.study import ALL_IN_ONE, EACH_ALONE, Contender, Record

TARGET = 0.37
CONTENDERS = (
    Contender(name="FedAvg", flags=study.CLOCKED),
    Contender(name="FedProx, mu 0.01", flags=("--algorithm", "fedprox", "--mu", "0.01")),
    Contender(name="FedProx, mu 0.1", flags=("--algorithm", "fedprox", "--mu", "0.1")),
    Contender(name="FedAvgM, momentum 0.5", flags=("--algorithm", "fedavgm", "--server-momentum", "0.5")),
    Contender(name="FedAvgM, momentum 0.9", flags=("--algorithm", "fedavgm", "--server-momentum", "0.9")),
    Contender(
        name="FedAvgM, momentum 0.9, rate 0.3",
        flags=("--algorithm", "fedavgm", "--server-momentum", "0.9", "--server-lr", "0.3"),
    ),
    *(
        Contender(name=name, flags=("--algorithm", name.lower(), "--server-lr", "0.1", "--server-tau", "0.01"))
        for name in ("FedAdagrad", "FedAdam", "FedYogi")  # rates and taus of `benchmarks.tuning`
    ),
    Contender(name="SCAFFOLD, option I", flags=("--algorithm", "scaffold", "--scaffold-option", "1")),
    Contender(name="SCAFFOLD, option II", flags=("--algorithm", "scaffold")),
    *(  # where local training does not move far in a round, its gradient at the round's start is worth something
        Contender(name=f"{name}, local rate 0.005", flags=(*flags, "--client-lr", "0.005"))
        for name, flags in (
            ("FedAvg", ()),
            ("SCAFFOLD, option I", ("--algorithm", "scaffold", "--scaffold-option", "1")),
            ("SCAFFOLD, option II", ("--algorithm", "scaffold")),
        )
    ),
    Contender(name="FedAvg, FedRS", flags=("--loss", "fedrs")),
    Contender(name="FedAvg, FedLC", flags=("--loss", "fedlc")),
    *(
        Contender(name=name, flags=(*study.CLOCKED, *unequal.WAYS[name]))
        for name in ("FedBuff, 60 versions", "FedAsync, 240 versions")
    ),
    Contender(name="all photos in one place", flags=("--min-clients", "1"), stores=ALL_IN_ONE),
    Contender(name="each store alone (mean)", flags=("--min-clients", "1"), stores=EACH_ALONE),
)
TRAVELS = {contender.name: contender.travels for contender in CONTENDERS}


def table(records: Sequence[Record]) -> str:
    """One row per contender: means and standard deviations over seeds."""
    columns = ["", "accuracy %", f"rounds to {TARGET:.0%}", f"MB to {TARGET:.0%}", "MB in all", "seeds"]
    rows = []
    for name, of in study.by_name(records).items():
        reached = [record.reached(TARGET) for record in of]
        found = [number for number in reached if number is not None]
        megabytes = [record.num_bytes[number - 1] / 1e6 for record, number in zip(of, reached, strict=True) if number]
        everywhere, travels = len(found) == len(of), TRAVELS.get(name, True)
        rows.append(
            [
                name, study.percent([record.final for record in of]),
                f"{statistics.fmean(found):.1f}" if everywhere else f"missed by {len(of) - len(found)}",
                f"{statistics.fmean(megabytes):.0f}" if travels and everywhere else "–",
                f"{statistics.fmean(record.num_bytes[-1] for record in of) / 1e6:.0f}" if travels else "–",
                str(len(of)),
            ]
        )  # fmt: skip
    return results.table(columns, rows)


def report(records: Sequence[Record]) -> str:
    """The section."""
    return (
        f"{table(records)}\n\nThe acceptance benchmark: 81 products, 8 stores (Dirichlet 0.3), 30 rounds of 2 local "
        "epochs (60 epochs in one place, or alone; versions of FedBuff and FedAsync are made of as many), accuracy on "
        "the official test photos of all products after the last round; mean and standard deviation over seeds."
    )


if __name__ == "__main__":
    study.main(__doc__, CONTENDERS, "algorithms", report)
