"""*robustness*: two of eight stores are hostile. Who withstands what, and what the defence costs where nobody attacks.

python -m benchmarks.robustness --seed 0
"""

from collections.abc import Sequence

from benchmarks import results, study
from benchmarks.study import Contender, Record

BOUND = ("--norm-bound", "3")
DEFENCES = {
    "mean": (),
    "mean, norm bound": BOUND,
    "median": ("--aggregator", "median"),
    "median, norm bound": ("--aggregator", "median", *BOUND),
    "trimmed mean": ("--aggregator", "trimmed-mean"),
    "trimmed mean, norm bound": ("--aggregator", "trimmed-mean", *BOUND),
    "multi-Krum": ("--aggregator", "multi-krum"),
    "multi-Krum, norm bound": ("--aggregator", "multi-krum", *BOUND),
}
HOSTILE = ("--attackers", str(study.NUM_HOSTILE), "--attack")
HONEST = "mean, of the six honest stores alone"
ATTACKS = {
    "nobody attacks": (),
    "update × -10": (*HOSTILE, "scale", "--attack-factor", "-10"),
    "signs flipped": (*HOSTILE, "sign-flip"),
    "labels flipped": (*HOSTILE, "label-flip"),
}
CONTENDERS = (
    Contender(name=HONEST, flags=("--min-clients", "6"), stores=study.HONEST),
    *(
        Contender(name=f"{defence}, {attack}", flags=(*flags, *more) or study.CLOCKED)
        for attack, more in ATTACKS.items()
        for defence, flags in DEFENCES.items()
    ),
)


def report(records: Sequence[Record]) -> str:
    """One row per defence: final accuracy under each attack."""
    found = study.by_name(records)

    def accuracy(name: str) -> str:
        of = found.get(name)
        return f"{study.percent([record.final for record in of])} [{len(of)}]" if of else "–"

    rows = [[defence, *(accuracy(f"{defence}, {attack}") for attack in ATTACKS)] for defence in DEFENCES]
    rows.append([HONEST, accuracy(HONEST), *("" for _ in list(ATTACKS)[1:])])
    return (
        results.table(["accuracy % [seeds]", *ATTACKS], rows)
        + "\n\nThe acceptance benchmark (8 stores, Dirichlet 0.3), two of the stores hostile; norm bound 3. The stores "
        "are not alike, which is what costs median-type rules accuracy where nobody attacks: what one store alone "
        "knows looks like an attack. *Of the six honest stores alone*: what there is to learn without the "
        "photos of those two."
    )


if __name__ == "__main__":
    study.main(__doc__, CONTENDERS, "robustness", report)
