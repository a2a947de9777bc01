"""Reports each store's gain from a run, compared with training alone."""

import statistics
from collections.abc import Iterable, Mapping, Sequence

from fedshelf.core.choices import Candidate
from fedshelf.core.events import StoreComparison
from fedshelf.core.text import counted
from fedshelf.reporting.formatting import percent


def kept(store: StoreComparison) -> float | None:
    """Return the accuracy of the model that the store keeps, as a fraction on its own mix of products."""
    return store.accuracies.get(store.best) if store.best is not None else None


def gain(store: StoreComparison) -> float | None:
    """Return the improvement over the store's own model, as a fraction."""
    accuracy, alone = kept(store), store.accuracies.get(Candidate.LOCAL)
    return None if accuracy is None or alone is None else accuracy - alone


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean over the stores that have a value."""
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found else None


def points(difference: float | None) -> str:
    """Format a difference of fractions in percentage points, such as `+12.2`."""
    return percent(None) if difference is None else f"{100 * difference:+.1f}"


def figures(accuracies: Mapping[Candidate, float | None]) -> str:
    """Format the available accuracies as ` (local 49.0 %, global 39.5 %)`; empty if there are none."""
    found = [f"{c.value} {percent(accuracies[c])}" for c in Candidate if accuracies.get(c) is not None]
    return f" ({', '.join(found)})" if found else ""


def verdict(stores: Sequence[StoreComparison]) -> str:
    """Summarize the gains in one sentence; empty if no store has a comparison."""
    judged = [(store, difference) for store in stores if (difference := gain(store)) is not None]
    if not judged:
        return ""
    better = sum(difference > 0 for _, difference in judged)
    on_test = all(store.on_test for store, _ in judged)
    alone = mean(store.accuracies.get(Candidate.LOCAL) for store, _ in judged)
    photos = "test photos" if on_test else "the validation photos that it was chosen on, which flatter it"
    right = percent(mean(kept(store) for store, _ in judged))
    return (
        f"worth it for {better} of {counted(len(judged), 'store')}: on its own mix of products a store keeps a model "
        f"that names {right} right (mean, on {photos}), and alone it would have one that names {percent(alone)}: "
        f"{points(mean(difference for _, difference in judged))} points"
    )
