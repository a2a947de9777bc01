"""What an algorithm is: a handful of functions on core types, data in, data out.

Shapes: S shared values, b values of a coordinate block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fedshelf.core.messages import Broadcast, Upload
from fedshelf.core.state import ClientState, ServerState
from fedshelf.training.trainer import Trainer

Reducer = Callable[[Sequence[Tensor], Sequence[float]], Tensor]
"""Reduce one coordinate block: rows [b] of the clients counted, in the order of their names, and their weights
(which sum to one) to the block's value [b]."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Aggregate:
    """What the clients counted amount to: `delta` [S], and how many they were."""

    delta: Tensor
    num_clients: int


class Algorithm(Protocol):
    """One paper: its client half and its server half."""

    @property
    def reducer(self) -> Reducer: ...

    @property
    def auxiliary(self) -> tuple[str, ...]:
        """Names of the vectors that an upload carries beside the delta; any other is refused."""
        ...

    def client_round(
        self, broadcast: Broadcast, state: ClientState, trainer: Trainer
    ) -> tuple[Upload, ClientState]: ...

    def weight(self, upload: Upload, staleness: int) -> float:
        """The upload's weight before normalization; `staleness` is zero in synchronous rounds."""
        ...

    def server_update(self, state: ServerState, aggregate: Aggregate, population: int) -> ServerState:
        """The state with the new model; pure. `population` counts the clients that could have been drawn."""
        ...
