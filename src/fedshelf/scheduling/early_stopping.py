"""Selection of the best round, and early stopping."""

from dataclasses import dataclass

from fedshelf.core.choices import Metric
from fedshelf.core.events import RoundFinished
from fedshelf.core.state import Best
from fedshelf.core.text import counted


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyStopping:
    """Tracks the best round.

    Attributes:
        metric: the metric compared; `auto` is the first that the run has of accuracy on the clients' validation photos,
            accuracy on the server's test photos, and training loss.
        patience: rounds without improvement that end the run; 0: never.
        newest: whether each round replaces the best one, because its model is the exact one for the photos of today.
    """

    metric: Metric = "auto"
    patience: int = 0
    newest: bool = False

    def better(self, record: RoundFinished, best: Best | None) -> Best | None:
        """The new best if `record` is better than `best`, otherwise `best`; the earlier of equals stays.

        Only values of one metric are compared: a round without the best round's metric is not better.
        """
        values = _values(record)
        chosen = best.metric if best else self.metric if self.metric != "auto" else next(iter(values), None)
        value = values.get(chosen) if chosen else None
        if self.newest and chosen is not None:
            return Best(round=record.round, value=value or 0.0, metric=chosen)
        if chosen is None or value is None or (best is not None and value <= best.value):
            return best
        return Best(round=record.round, value=value, metric=chosen)

    def exhausted(self, round: int, best: Best | None) -> bool:
        """Whether `patience` rounds have passed since the best one."""
        return bool(self.patience) and best is not None and round - best.round >= self.patience

    def why_stopped(self, best: Best | None) -> str:
        """The reason reported for a run that ends early."""
        rounds = counted(self.patience, "round")
        return f"stopped early: {rounds} without improvement on round {best.round if best else 0}"


def _values(record: RoundFinished) -> dict[Metric, float]:
    """The record's metrics in order of preference; more is better for each."""
    values: dict[Metric, float | None] = {
        "accuracy": record.accuracy,
        "central_accuracy": record.central_accuracy,
        "train_loss": -record.train_loss if record.train_loss is not None else None,
    }
    return {metric: value for metric, value in values.items() if value is not None}
