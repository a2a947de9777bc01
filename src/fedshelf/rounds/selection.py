"""Which round is best, and when to stop early."""

from dataclasses import dataclass

from fedshelf.core.choices import Metric
from fedshelf.core.events import RoundFinished
from fedshelf.core.state import Best


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """`metric` `auto` takes the first that a round has of: accuracy on the clients' validation photos, accuracy on
    the server's test photos, training loss. `patience` is how many rounds without a better one end the run (0: never).
    """

    metric: Metric = "auto"
    patience: int = 0

    def value(self, record: RoundFinished) -> float | None:
        """The record's metric, as a number of which more is better."""
        values = {
            "accuracy": record.accuracy,
            "central_accuracy": record.central_accuracy,
            "train_loss": -record.train_loss if record.train_loss is not None else None,
        }
        if self.metric != "auto":
            return values[self.metric]
        return next((value for value in values.values() if value is not None), None)

    def better(self, record: RoundFinished, best: Best | None) -> Best | None:
        """The new best if `record` is better than `best`, else `best`; of equals, the earlier stays."""
        value = self.value(record)
        if value is None or (best is not None and value <= best.value):
            return best
        return Best(round=record.round, value=value)

    def exhausted(self, round: int, best: Best | None) -> bool:
        """Whether `patience` rounds have passed since the best one."""
        return bool(self.patience) and best is not None and round - best.round >= self.patience
