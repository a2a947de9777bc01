"""*skew*: what each store gains, on its own mix of products, from the global model and from a personalized one."""

import statistics
from collections.abc import Mapping, Sequence

from benchmarks import results
from benchmarks.studies import study
from benchmarks.studies.study import Experiment, Result, Study

METHODS = {
    "FedAvg, fine-tuned": ("--personalize", "finetune"),
    "FedAvgM, fine-tuned": ("--personalize", "finetune", "--algorithm", "fedavgm", "--server-momentum", "0.5"),
    "FedAvg, 60 rounds, fine-tuned": ("--personalize", "finetune", "--rounds", "60"),
    "FedAvg, 3 epochs at 0.01": ("--personalize", "finetune", "--finetune-epochs", "3", "--finetune-lr", "0.01"),
    "FedAvg, class prior only": ("--personalize", "finetune", "--finetune-epochs", "0"),
    "FedRS, fine-tuned": ("--personalize", "finetune", "--loss", "fedrs"),
    "FedLC, fine-tuned": ("--personalize", "finetune", "--loss", "fedlc"),
    "FedBN": ("--personalize", "fedbn"),
    "FedPer": ("--personalize", "fedper"),
    "FedRep": ("--personalize", "fedrep"),
    "Ditto": ("--personalize", "ditto"),
}
SPLITS = {"dirichlet": "Dirichlet 0.3", "assortment": "each store sells a third of the products"}
EXPERIMENTS = tuple(
    Experiment(name=f"{method}, {split}", flags=(*flags, "--val-fraction", "0.1"), split=split)
    for split in SPLITS
    for method, flags in METHODS.items()
)
MODELS = ("local", "global", "personalized", "best")


def report(found: Sequence[Result]) -> str:
    """A table per split: the mean over stores and the worst store."""
    grouped = study.by_name(found)
    columns = ["", *(f"{model}, mean (worst) %" for model in MODELS), "worst gain over local", "seeds"]
    parts = []
    for split, description in SPLITS.items():
        rows = [_row(method, grouped[f"{method}, {split}"]) for method in METHODS if f"{method}, {split}" in grouped]
        if rows:
            parts.append(f"Stores: {description}.\n\n{results.table(columns, rows)}")
    parts.append(
        "The acceptance benchmark with 10 % of each store's photos held out. Accuracy on each store's own mix of "
        "products, on the official test photos: the mean over the 8 stores, and the worst store. *local* is trained "
        "on the store's photos alone; *best* is the model that the store picks on its held-out photos; *worst gain "
        "over local* is the smallest gain of any store by picking that model, in points. *class prior only* fine-tunes "
        "for no epochs: it puts the store's product frequencies into the last layer's bias."
    )
    return "\n\n".join(parts)


def _row(method: str, found: Sequence[Result]) -> list[str]:
    cells = []
    for model in MODELS:
        means, worst = [], []
        for result in found:
            accuracies = (_accuracy(store, model) for store in result.stores.values())
            values = [value for value in accuracies if value is not None]
            if values:
                means.append(statistics.fmean(values))
                worst.append(min(values))
        cells.append(f"{study.percent(means)} ({100 * statistics.fmean(worst):.1f})" if means else "–")
    gains = [
        (_accuracy(store, "best") or 0.0) - (_accuracy(store, "local") or 0.0)
        for result in found
        for store in result.stores.values()
    ]
    return [method, *cells, f"{100 * min(gains):+.1f}" if gains else "–", str(len(found))]


def _accuracy(store: Mapping[str, float | str | None], model: str) -> float | None:
    """A store's accuracy with one of its models; `best` is the one that it keeps."""
    found = store.get(str(store["best"])) if model == "best" else store.get(model)
    return found if isinstance(found, float) else None


STUDY = Study(
    name="skew", help="Compare what each store gains from personalization.", experiments=EXPERIMENTS, report=report,
)  # fmt: skip
