"""What an algorithm is: a handful of functions on core types, data in, data out; and the settings that several share.

Shapes: S shared values of which the first T are trainable, b values of a coordinate block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Protocol, TypeAlias

from fedshelf.core.settings import Scope, Setting

if TYPE_CHECKING:  # to be imported from here, for type checkers again
    from torch import Tensor as Tensor

    from fedshelf.core.messages import Broadcast as Broadcast
    from fedshelf.core.messages import Upload as Upload
    from fedshelf.core.state import ClientState as ClientState
    from fedshelf.core.state import ServerState as ServerState
    from fedshelf.training.trainer import Trainer as Trainer

MU = Setting(key="mu", help="Strength of the proximal term.", ge=0)
SERVER_LR = Setting(key="server_lr", help="Learning rate of the server's step.", gt=0, scope=Scope.SERVER)
SERVER_MOMENTUM = Setting(key="server_momentum", help="Momentum of the server's step.", ge=0, lt=1, scope=Scope.SERVER)
BUFFER_SIZE = Setting(key="buffer_size", help="Uploads per version.", ge=1, scope=Scope.SERVER)

Reducer: TypeAlias = "Callable[[Sequence[Tensor], Sequence[float]], Tensor]"
"""Reduce one coordinate block: rows [b] of the clients counted, in the order of their names, and their weights
(which sum to one) to the block's value [b]."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Aggregate:
    """What the clients counted amount to.

    Attributes:
        delta: [S], by the algorithm's weights.
        num_clients: how many they were.
        num_trainable: T: the rest of `delta` is batch-norm statistics.
        mean_weight: of the weights before they were normalized; what they say beside their proportions.
        auxiliary: [T] each: the plain means of the vectors that the uploads carried beside their deltas.
    """

    delta: Tensor
    num_clients: int
    num_trainable: int
    mean_weight: float = 1.0
    auxiliary: Mapping[str, Tensor] = field(default_factory=dict)


def stepped(params: Tensor, aggregate: Aggregate, step: Tensor) -> Tensor:
    """The next model [S]: `params` [S] with `step` [T] added to the trainable values; batch-norm statistics move by
    their mean change."""
    change = aggregate.delta.clone()
    change[: aggregate.num_trainable] = step
    return params + change


def polynomial(staleness: int, exponent: float) -> float:
    """(1 + staleness)^-exponent: what an upload is worth that was trained on a model `staleness` versions old (Xie et
    al. 2019, section 5.2; with exponent 1/2, Nguyen et al. 2022)."""
    return float((1 + staleness) ** -exponent)


class Algorithm(Protocol):
    """One paper: its client half and its server half. How uploads become one is another matter (`Aggregator`).

    What a subclass does not say otherwise is as in averaging: plain local training, weighted by photos.
    """

    @property
    def auxiliary(self) -> tuple[str, ...]:
        """Names of the vectors [T] that an upload carries beside the delta; any other is refused."""
        return ()

    def broadcast(self, state: ServerState, num_trainable: int) -> Mapping[str, Tensor]:
        """The vectors [T] that go out with the model to those who train."""
        return {}

    def client_round(self, broadcast: Broadcast, state: ClientState, trainer: Trainer) -> tuple[Upload, ClientState]:
        """What a client sends, and the state that it has once that is counted."""
        return trainer.upload(broadcast), state

    def weight(self, upload: Upload, staleness: int) -> float:
        """The upload's weight before normalization; `staleness`, in versions, is zero in synchronous rounds."""
        return float(upload.num_examples)

    def server_update(self, state: ServerState, aggregate: Aggregate, population: int) -> ServerState:
        """The state with the new model; pure. `population` counts the clients that could have been drawn."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Asynchronous:
    """What else an algorithm has whose server does not wait for a cohort (`rounds.buffered`).

    Attributes:
        buffer_size: uploads that make the next version.
        exponent: of staleness.
        max_staleness: versions that an upload may be old; None: any number.
        relative_to_present: whether a delta means local minus the present model, not minus the one that the client
            began with.
    """

    buffer_size: Annotated[int, BUFFER_SIZE] = 1
    exponent: Annotated[float, Setting(key="staleness_exponent", help="How fast an upload loses weight with age: its "
        "weight is (1 + age in versions) to the power of minus this.", ge=0, scope=Scope.SERVER)] = 0.5  # fmt: skip
    max_staleness: Annotated[int | None, Setting(help="Maximum age of an upload, in versions; no limit unless set.",
        ge=0, scope=Scope.SERVER)] = None  # fmt: skip
    relative_to_present: ClassVar[bool] = False
