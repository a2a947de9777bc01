"""*skew*: what a store has of it all: on its own mix of products, alone, with everybody's model, and with its own.

python -m benchmarks.skew --seed 0
"""

import statistics
from collections.abc import Mapping, Sequence

from benchmarks import results, study
from benchmarks.study import Contender, Record

WAYS = {
    "FedAvg, fine-tuned": ("--personalize", "finetune"),
    "FedAvgM, fine-tuned": ("--personalize", "finetune", "--algorithm", "fedavgm", "--server-momentum", "0.5"),
    "FedAvg, 60 rounds, fine-tuned": ("--personalize", "finetune", "--rounds", "60"),
    "FedAvg, 3 epochs at 0.01": ("--personalize", "finetune", "--finetune-epochs", "3", "--finetune-lr", "0.01"),
    "FedAvg, prior alone": ("--personalize", "finetune", "--finetune-epochs", "0"),
    "FedRS, fine-tuned": ("--personalize", "finetune", "--loss", "fedrs"),
    "FedLC, fine-tuned": ("--personalize", "finetune", "--loss", "fedlc"),
    "FedBN": ("--personalize", "fedbn"),
    "FedPer": ("--personalize", "fedper"),
    "FedRep": ("--personalize", "fedrep"),
    "Ditto": ("--personalize", "ditto"),
}
SPLITS = {"dirichlet": "Dirichlet 0.3", "assortment": "a store sells a third of the products"}
CONTENDERS = tuple(
    Contender(name=f"{way}, {split}", flags=(*flags, "--val-fraction", "0.1"), split=split)
    for split in SPLITS
    for way, flags in WAYS.items()
)
MODELS = ("local", "global", "personalized", "best")


def report(records: Sequence[Record]) -> str:
    """A table per split: means over stores and worst stores."""
    found = study.by_name(records)
    parts = []
    for split, words in SPLITS.items():
        rows = [_row(way, found[f"{way}, {split}"]) for way in WAYS if f"{way}, {split}" in found]
        columns = ["", *(f"{model}, mean (worst) %" for model in MODELS), "worst against alone", "seeds"]
        if rows:
            parts.append(f"Stores: {words}.\n\n{results.table(columns, rows)}")
    parts.append(
        "The acceptance benchmark with 10 % of each store's photos held out for its choice. Accuracy on each store's "
        "own mix of products, on the official test photos: mean over the 8 stores, and the worst of them. *best* is "
        "the model that the store has chosen on its held-out photos; *worst against alone*: by how many points the "
        "store that has lost most (or won least) by that is above its model trained alone. *prior alone*: fine-tuning "
        "of no epochs, what the store stocks in the last layer's bias."
    )
    return "\n\n".join(parts)


def _row(way: str, records: Sequence[Record]) -> list[str]:
    cells = []
    for model in MODELS:
        means, worst = [], []
        for record in records:
            found = (_value(store, model) for store in record.stores.values())
            values = [value for value in found if value is not None]
            if values:
                means.append(statistics.fmean(values))
                worst.append(min(values))
        cells.append(f"{study.percent(means)} ({100 * statistics.fmean(worst):.1f})" if means else "–")
    losses = [
        (_value(store, "best") or 0.0) - (_value(store, "local") or 0.0)
        for record in records
        for store in record.stores.values()
    ]
    return [way, *cells, f"{100 * min(losses):+.1f}" if losses else "–", str(len(records))]


def _value(store: Mapping[str, float | str | None], model: str) -> float | None:
    """A store's accuracy with one of its models; with `best`, with the one that it keeps."""
    found = store.get(str(store["best"])) if model == "best" else store.get(model)
    return found if isinstance(found, float) else None


if __name__ == "__main__":
    study.main(__doc__, CONTENDERS, "skew", report)
