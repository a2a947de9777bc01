"""*algorithms*: every algorithm, between two bounds: all photos in one place, and each store alone."""

import statistics
from collections.abc import Sequence

from benchmarks import results
from benchmarks.studies import study, unequal
from benchmarks.studies.study import ALL_IN_ONE, EACH_ALONE, Experiment, Result, Study

TARGET = 0.37
SCAFFOLD_OPTIONS = (
    ("SCAFFOLD, option I", ("--algorithm", "scaffold", "--scaffold-option", "1")),
    ("SCAFFOLD, option II", ("--algorithm", "scaffold")),
)
EXPERIMENTS = (
    Experiment(name="FedAvg", flags=study.EQUALLY_FAST),
    Experiment(name="FedProx, mu 0.01", flags=("--algorithm", "fedprox", "--mu", "0.01")),
    Experiment(name="FedProx, mu 0.1", flags=("--algorithm", "fedprox", "--mu", "0.1")),
    Experiment(name="FedAvgM, momentum 0.5", flags=("--algorithm", "fedavgm", "--server-momentum", "0.5")),
    Experiment(name="FedAvgM, momentum 0.9", flags=("--algorithm", "fedavgm", "--server-momentum", "0.9")),
    Experiment(
        name="FedAvgM, momentum 0.9, rate 0.3",
        flags=("--algorithm", "fedavgm", "--server-momentum", "0.9", "--server-lr", "0.3"),
    ),
    *(
        Experiment(name=name, flags=("--algorithm", name.lower(), "--server-lr", "0.1", "--server-tau", "0.01"))
        for name in ("FedAdagrad", "FedAdam", "FedYogi")  # rates and taus of *tuning*
    ),
    *(Experiment(name=name, flags=flags) for name, flags in SCAFFOLD_OPTIONS),
    *(  # with a small local rate, the gradient at a round's start stays representative of the round
        Experiment(name=f"{name}, local rate 0.005", flags=(*flags, "--client-lr", "0.005"))
        for name, flags in (("FedAvg", ()), *SCAFFOLD_OPTIONS)
    ),
    Experiment(name="FedAvg, FedRS", flags=("--loss", "fedrs")),
    Experiment(name="FedAvg, FedLC", flags=("--loss", "fedlc")),
    *(
        Experiment(name=name, flags=(*study.EQUALLY_FAST, *unequal.METHODS[name]))
        for name in ("FedBuff, 60 versions", "FedAsync, 240 versions")
    ),
    Experiment(name="all photos in one place", flags=("--min-clients", "1"), stores=ALL_IN_ONE),
    Experiment(name="each store alone (mean)", flags=("--min-clients", "1"), stores=EACH_ALONE),
)
IS_FEDERATED = {experiment.name: experiment.is_federated for experiment in EXPERIMENTS}


def report(found: Sequence[Result]) -> str:
    """One row per experiment: means and standard deviations over seeds."""
    columns = ["", "accuracy %", f"rounds to {TARGET:.0%}", f"MB to {TARGET:.0%}", "MB in total", "seeds"]
    rows = []
    for name, of in study.by_name(found).items():
        rounds = [result.round_reaching(TARGET) for result in of]
        reached = [number for number in rounds if number is not None]
        megabytes = [result.num_bytes[number - 1] / 1e6 for result, number in zip(of, rounds, strict=True) if number]
        always, is_federated = len(reached) == len(of), IS_FEDERATED[name]
        rows.append(
            [
                name, study.percent([result.final_accuracy for result in of]),
                f"{statistics.fmean(reached):.1f}" if always else f"missed by {len(of) - len(reached)}",
                f"{statistics.fmean(megabytes):.0f}" if is_federated and always else "–",
                f"{statistics.fmean(result.num_bytes[-1] for result in of) / 1e6:.0f}" if is_federated else "–",
                str(len(of)),
            ]
        )  # fmt: skip
    return (
        f"{results.table(columns, rows)}\n\nThe acceptance benchmark: 81 products, 8 stores (Dirichlet 0.3), 30 rounds "
        "of 2 local epochs (60 epochs in one place and alone; as many local epochs in all versions of FedBuff and "
        "FedAsync). Accuracy on the official test photos of all products after the last round; mean and standard "
        "deviation over seeds."
    )


STUDY = Study(
    name="algorithms", help="Compare all algorithms, central training, and each store alone.",
    experiments=EXPERIMENTS, report=report,
)  # fmt: skip
