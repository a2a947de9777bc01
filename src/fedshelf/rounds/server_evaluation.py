"""The server's own test of the model, on photos that no store has."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fedshelf.core.state import ServerState
from fedshelf.training.trainer import Score


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerEvaluation:
    """`evaluate` scores a model [S] (None: there are no test photos), every so many rounds and after the `last`."""

    evaluate: Callable[[Tensor], Score] | None = None
    every: int = 1
    last: int = 0

    def score(self, state: ServerState) -> Score | None:
        """How the model of `state` does; None where it is not tested."""
        if self.evaluate is None or (state.round % self.every and state.round != self.last):
            return None
        return self.evaluate(state.model)
