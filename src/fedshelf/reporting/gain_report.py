"""Was it worth it? What a run has brought each store, against having trained alone."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from fedshelf.core.choices import Candidate
from fedshelf.core.text import counted
from fedshelf.reporting.formatting import percent


class Outcome(Protocol):
    """What became of a run at one store: see `core.events.StoreComparison`."""

    @property
    def best(self) -> Candidate | None: ...
    @property
    def accuracies(self) -> Mapping[Candidate, float | None]: ...
    @property
    def on_test(self) -> bool: ...


def kept(store: Outcome) -> float | None:
    """How the model does that the store keeps; a fraction of its own mix of products."""
    return store.accuracies.get(store.best) if store.best is not None else None


def gain(store: Outcome) -> float | None:
    """How much better that is than the store alone; a fraction."""
    accuracy, alone = kept(store), store.accuracies.get(Candidate.LOCAL)
    return None if accuracy is None or alone is None else accuracy - alone


def mean(values: Iterable[float | None]) -> float | None:
    """Over the stores that have a value."""
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found else None


def points(difference: float | None) -> str:
    """A difference of fractions as `+12.2`."""
    return percent(None) if difference is None else f"{100 * difference:+.1f}"


def figures(accuracies: Mapping[Candidate, float | None]) -> str:
    """What there is of them as ` (local 49.0 %, global 39.5 %)`; empty where there is nothing."""
    found = [f"{c.value} {percent(accuracies[c])}" for c in Candidate if accuracies.get(c) is not None]
    return f" ({', '.join(found)})" if found else ""


def verdict(stores: Sequence[Outcome]) -> str:
    """One sentence; empty where no store can tell."""
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
