"""The interface of an algorithm: a few pure functions on core types, and the settings that several share.

Shapes: S shared values of which the first T are trainable, b values of a coordinate block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple, Protocol, Self, TypeAlias

from fedshelf.core.errors import RefusedError
from fedshelf.core.settings import Scope, Setting

if TYPE_CHECKING:  # re-exported for type checkers
    from torch import Tensor as Tensor

    from fedshelf.core.growth import Growth as Growth
    from fedshelf.core.messages import Broadcast as Broadcast
    from fedshelf.core.messages import CandidateScore as CandidateScore
    from fedshelf.core.messages import Upload as Upload
    from fedshelf.core.params import Layout as Layout
    from fedshelf.core.state import ClientState as ClientState
    from fedshelf.core.state import ModelState as ModelState
    from fedshelf.training.trainer import Trainer as Trainer

MU = Setting(key="mu", help="Strength of the proximal term.", ge=0)
SERVER_LR = Setting(key="server_lr", help="Learning rate of the server's step.", gt=0, scope=Scope.SERVER)
SERVER_MOMENTUM = Setting(key="server_momentum", help="Momentum of the server's step.", ge=0, lt=1, scope=Scope.SERVER)
BUFFER_SIZE = Setting(key="buffer_size", help="Uploads per version.", ge=1, scope=Scope.SERVER)

Reducer: TypeAlias = "Callable[[Sequence[Tensor], Sequence[float]], Tensor]"
"""Reduces one coordinate block: takes the rows [b] of the counted clients, in the order of their names, and their
weights (which sum to one), and returns the block's value [b].
"""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Aggregate:
    """The aggregate of the counted clients.

    Attributes:
        delta: [S], weighted by the algorithm.
        num_clients: number of counted clients.
        num_trainable: T; the rest of `delta` is batch-norm statistics.
        mean_weight: mean weight before normalization.
        auxiliary: [T] each, the plain means of the uploads' auxiliary vectors.
    """

    delta: Tensor
    num_clients: int
    num_trainable: int
    mean_weight: float = 1.0
    auxiliary: Mapping[str, Tensor] = field(default_factory=dict)


def stepped(params: Tensor, aggregate: Aggregate, step: Tensor) -> Tensor:
    """The next model [S].

    Args:
        params: the current model [S].
        aggregate: batch-norm statistics move by its mean change.
        step: [T], added to the trainable values.
    """
    change = aggregate.delta.clone()
    change[: aggregate.num_trainable] = step
    return params + change


def grown_model(state: ModelState, growth: Growth) -> ModelState:
    """The state with its models [S] grown, and the optimizer's vectors as they are."""
    grown = (None if model is None else growth.shared(model) for model in (state.params, state.sent, state.mean))
    params, sent, mean = grown
    return replace(state, params=state.params if params is None else params, sent=sent, mean=mean)


def polynomial(staleness: int, exponent: float) -> float:
    """(1 + staleness)^-exponent: the weight of an upload trained on a model `staleness` versions old.

    Source: Xie et al. 2019, section 5.2; with exponent 1/2, Nguyen et al. 2022.
    """
    return float((1 + staleness) ** -exponent)


@dataclass(frozen=True, slots=True)
class VectorSpec:
    """The size and type of a vector in an upload.

    Attributes:
        size: number of values.
        dtype: their type.
    """

    size: int
    dtype: Literal["float32", "float64"] = "float32"


class Candidates(NamedTuple):
    """Models for the stores to choose among.

    Attributes:
        values: all of them, in one vector.
        num_models: their number.
        num_losses: losses that a store answers with for each.
    """

    values: Tensor
    num_models: int
    num_losses: int


class Algorithm(Protocol):
    """An algorithm's client half and server half. How uploads are aggregated is separate (`Aggregator`).

    The defaults are those of averaging: plain local training, weighted by photos.
    """

    sums: ClassVar[bool] = False
    """Whether uploads are sums over photos, which are added up with no bound and no codec."""

    counts_photos: ClassVar[bool] = False
    """Whether these sums are exact, and tell how many photos they are of.

    A store can send them negated, and is then taken out of the model exactly.
    """

    ignores: ClassVar[tuple[str, ...]] = ()
    """Fields of a run's configuration that have no effect with this algorithm."""

    @property
    def weighs_examples(self) -> bool:
        """Whether `weight` depends on the number of photos, unless the run weights all uploads alike."""
        return "weights" not in self.ignores

    def for_model(self, layout: Layout, head: str) -> Self:
        """The algorithm for a model of this layout, whose output layer is `head` ("" if it has none)."""
        return self

    @property
    def auxiliary(self) -> tuple[str, ...]:
        """Names of the auxiliary vectors [T] that an upload carries; any other is refused."""
        return ()

    def vectors(self, layout: Layout) -> Mapping[str, VectorSpec]:
        """The vectors of an upload by name: the difference of the model, and auxiliary ones."""
        from fedshelf.core.messages import AUXILIARY, DELTA

        auxiliary = {AUXILIARY + name: VectorSpec(layout.num_trainable) for name in self.auxiliary}
        return {DELTA: VectorSpec(layout.num_shared), **auxiliary}

    def broadcast(self, state: ModelState, num_trainable: int) -> Mapping[str, Tensor]:
        """The vectors [T] that are sent with the model to clients that train."""
        return {}

    def client_round(self, broadcast: Broadcast, state: ClientState, trainer: Trainer) -> tuple[Upload, ClientState]:
        """Train at the client; return the upload, and the state to commit once it is counted."""
        return trainer.upload(broadcast), state

    def checked(self, upload: Upload, *, num_photos: int, num_counted: int) -> Upload:
        """A received upload, whose sizes are right and which is finite, if its values make sense.

        Args:
            upload: the upload.
            num_photos: photos that its client joined with.
            num_counted: photos that its client's counted uploads stand for.

        Raises:
            RefusedError: they do not; names the first problem.
        """
        return upload

    def at_fault(self, state: ModelState, uploads: Mapping[str, Upload]) -> Mapping[str, str]:
        """By client, why its upload makes the next model unusable. Without any, the largest uploads are suspected."""
        return {}

    def weight(self, upload: Upload, staleness: int) -> float:
        """The upload's weight before normalization; `staleness`, in versions, is zero in synchronous rounds."""
        return float(upload.weight)

    def server_update(self, state: ModelState, aggregate: Aggregate, population: int) -> ModelState:
        """The state with the new model (pure); `population` is the number of clients that the cohort was drawn from."""
        ...

    def candidates(self, state: ModelState) -> Candidates | None:
        """After `server_update`, models for the stores to choose among; None if there is no choice."""
        return None

    def score_candidates(self, broadcast: Broadcast, trainer: Trainer) -> tuple[CandidateScore, ...]:
        """Score the candidates of `broadcast` on the client's validation photos."""
        raise RefusedError("this algorithm has no candidates to choose among")

    def choose(
        self, state: ModelState, scores: Sequence[CandidateScore], num_photos: float
    ) -> tuple[ModelState, Tensor]:  # fmt: skip
        """The state with the model that scores on so many photos, of all clients, favor.

        Returns:
            The state, and the values [S] of that model before the validation photos became a part of it.
        """
        raise ValueError("this algorithm has no candidates to choose among")

    def grow_server(self, state: ModelState, growth: Growth) -> ModelState:
        """The state of a model that gets new classes. What the optimizer keeps starts with zeros for new values."""
        optimizer = {name: growth.trainable(vector) for name, vector in state.optimizer.items()}
        return replace(grown_model(state, growth), optimizer=optimizer)

    def grow_client(self, kept: Mapping[str, Tensor], growth: Growth) -> Mapping[str, Tensor]:
        """What a client keeps for a model that gets new classes: zeros for the new values."""
        return {name: growth.trainable(vector) for name, vector in kept.items()}

    def solve_alone(self, params: Tensor, trainer: Trainer) -> Tensor:
        """The values [S] of a model that the algorithm makes of one client's photos; only for algorithms of `sums`."""
        raise ValueError("this algorithm trains in steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asynchronous:
    """Settings of an algorithm whose server does not wait for a cohort (`rounds.buffered`).

    Attributes:
        buffer_size: uploads per version.
        exponent: exponent of staleness.
        max_staleness: limit of an upload's staleness in versions; None: no limit.
        relative_to_present: whether a delta is taken relative to the current model instead of the model that the client
            started from.
    """

    buffer_size: Annotated[int, BUFFER_SIZE] = 1
    exponent: Annotated[float, Setting(key="staleness_exponent", help="How fast an upload loses weight with age: its "
        "weight is (1 + age in versions) to the power of minus this.", ge=0, scope=Scope.SERVER)] = 0.5  # fmt: skip
    max_staleness: Annotated[int | None, Setting(help="Maximum age of an upload, in versions; no limit unless set.",
        ge=0, scope=Scope.SERVER)] = None  # fmt: skip
    relative_to_present: ClassVar[bool] = False
