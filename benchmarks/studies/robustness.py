"""*robustness*: two of eight stores attack. What each aggregation rule withstands, and what it costs otherwise."""

from collections.abc import Sequence

from benchmarks import results
from benchmarks.studies import study
from benchmarks.studies.study import Experiment, Result, Study

BOUND = ("--norm-bound", "3")
RULES = {
    "mean": (),
    "mean, norm bound": BOUND,
    "median": ("--aggregator", "median"),
    "median, norm bound": ("--aggregator", "median", *BOUND),
    "trimmed mean": ("--aggregator", "trimmed-mean"),
    "trimmed mean, norm bound": ("--aggregator", "trimmed-mean", *BOUND),
    "multi-Krum": ("--aggregator", "multi-krum"),
    "multi-Krum, norm bound": ("--aggregator", "multi-krum", *BOUND),
}
ATTACKERS = ("--attackers", str(study.NUM_ATTACKERS), "--attack")
HONEST = "mean of the six honest stores alone"
ATTACKS = {
    "no attack": (),
    "update × -10": (*ATTACKERS, "scale", "--attack-factor", "-10"),
    "signs flipped": (*ATTACKERS, "sign-flip"),
    "labels flipped": (*ATTACKERS, "label-flip"),
}


def _unbounded(flags: Sequence[str], attack: str) -> Sequence[str]:
    """The flags of a rule without a bound: off instead of automatic, which changes nothing without an attack."""
    return flags if attack == "no attack" or "--norm-bound" in flags else (*flags, "--norm-bound", "off")


EXPERIMENTS = (
    Experiment(name=HONEST, flags=("--min-clients", "6"), stores=study.HONEST),
    *(
        Experiment(name=f"{rule}, {attack}", flags=(*_unbounded(flags, attack), *attack_flags) or study.EQUALLY_FAST)
        for attack, attack_flags in ATTACKS.items()
        for rule, flags in RULES.items()
    ),
)


def report(found: Sequence[Result]) -> str:
    """One row per rule: the final accuracy under each attack."""
    grouped = study.by_name(found)

    def accuracy(name: str) -> str:
        of = grouped.get(name)
        return f"{study.percent([result.final_accuracy for result in of])} [{len(of)}]" if of else "–"

    rows = [[rule, *(accuracy(f"{rule}, {attack}") for attack in ATTACKS)] for rule in RULES]
    rows.append([HONEST, accuracy(HONEST), *("" for _ in list(ATTACKS)[1:])])
    return (
        results.table(["accuracy % [seeds]", *ATTACKS], rows)
        + "\n\nThe acceptance benchmark (8 stores, Dirichlet 0.3); two of the stores attack; norm bound 3. The stores "
        "differ, which is why rules like the median lose accuracy without an attack: what only one store knows looks "
        "like an attack. *Mean of the six honest stores alone* shows what can be learned without the photos of the "
        "other two."
    )


STUDY = Study(
    name="robustness", help="Attack robust aggregation rules with two of eight stores.",
    experiments=EXPERIMENTS, report=report,
)  # fmt: skip
