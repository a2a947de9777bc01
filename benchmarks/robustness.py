"""*robustness*: two of eight stores send -10 times their update. Who withstands that, and what the defence costs where
nobody attacks.

    python -m benchmarks.robustness --seed 0
"""

from collections.abc import Sequence

from benchmarks import results, study
from benchmarks.study import Contender, Record

ATTACKED = ("--attack", "scale", "--attackers", "2", "--attack-factor", "-10")
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
CLEAN, UNDER_ATTACK = "{}, clean", "{}, 2 of 8 at -10"
CONTENDERS = tuple(
    Contender(name=pattern.format(name), flags=(*flags, *more) or study.CLOCKED)
    for name, flags in DEFENCES.items()
    for pattern, more in ((CLEAN, ()), (UNDER_ATTACK, ATTACKED))
)


def report(records: Sequence[Record]) -> str:
    """One row per defence: final accuracy with and without the attack."""
    found = study.by_name(records)

    def accuracy(pattern: str, name: str) -> str:
        of = found.get(pattern.format(name))
        return study.percent([record.final for record in of]) if of else "–"

    rows = [[name, accuracy(CLEAN, name), accuracy(UNDER_ATTACK, name)] for name in DEFENCES]
    return (
        results.table(["", "nobody attacks: accuracy %", "2 of 8 send -10 × their update: accuracy %"], rows)
        + "\n\nThe acceptance benchmark (8 stores, Dirichlet 0.3); the stores are not alike, which is what costs "
        "median-type rules accuracy where nobody attacks: what one store alone knows looks like an attack."
    )


if __name__ == "__main__":
    study.main(__doc__, CONTENDERS, "robustness", report)
