"""What the server and a client say to each other. All messages are frozen; none names a file or holds a photo.

    client                     server
      Join        ──────────▶            who I am, which classes I hold
                  ◀──────────  Setup     the run's configuration, the catalogue, the layout's digest
      Ready       ──────────▶            how many photos that leaves me with
                  ◀──────────  Broadcast train (or evaluate) this model
      Upload      ──────────▶            what training changed
      Evaluation  ──────────▶            how the model does on my validation photos
      Comparison  ──────────▶            which model serves me best, once the rounds are over
      Failure     ──────────▶            why there is neither

A `Broadcast` and an `Upload` carry named vectors. Each is plain (a `Tensor`) or `Encoded` by the run's codec.

Everything that leaves a client is one of these objects and nothing else (docs/explanation/what-leaves-a-store.md).
Shapes: S shared values of the model (see `params`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TypeAlias

from torch import Tensor

from fedshelf.core.choices import Candidate
from fedshelf.core.class_folder import ClassFolder as ClassFolder
from fedshelf.core.encoded import Encoded

PROTOCOL_VERSION = 4
RUN_FINISHED = "the run is finished"
"""What a server tells its clients at the end of a run that did not fail."""

Vector: TypeAlias = Tensor | Encoded
PARAMS, DELTA = "params", "delta"
"""The main vector [S] of a plain broadcast, and of a plain upload."""
TRAINABLE, STATISTICS, AUXILIARY = "trainable", "statistics", "auxiliary."
"""The two segments that a main vector is encoded as, and the prefix of vectors that an algorithm adds."""


def auxiliary_vectors(vectors: Mapping[str, Tensor]) -> dict[str, Vector]:
    """What an algorithm adds to a message, by the names that it has there."""
    return {AUXILIARY + name: vector for name, vector in vectors.items()}


def _auxiliary(vectors: Mapping[str, Vector]) -> dict[str, Tensor]:
    return {
        name.removeprefix(AUXILIARY): vector
        for name, vector in vectors.items()
        if name.startswith(AUXILIARY) and isinstance(vector, Tensor)
    }


def _plain(vectors: Mapping[str, Vector], name: str) -> Tensor:
    vector = vectors[name]
    if not isinstance(vector, Tensor):
        raise TypeError(f"vector {name!r} is still encoded")
    return vector


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class TaskKey:
    """Names one piece of work for ever; the same key asked twice is answered with the same bytes."""

    run_id: str
    round: int
    attempt: int


def keyed(purpose: str, key: TaskKey) -> str:
    """What a draw for the task `key` is for: another attempt at a round is other work, and draws anew."""
    return f"{purpose}-again-{key.attempt}" if key.attempt else purpose


@dataclass(frozen=True, kw_only=True, slots=True)
class Join:
    """A client introduces itself.

    `identity` is a random token that the client made on first start: the same name with another identity is
    somebody else.
    """

    protocol: int
    version: str
    client: str
    identity: str
    classes: tuple[ClassFolder, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """Everything a client needs before its first round.

    `config` is the client's part of the run's configuration (TOML text); `catalogue` maps class index to name
    and member paths (JSON text).
    """

    run_id: str
    config: str
    catalogue: str
    layout_digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """The client has built the model; the digests prove that both sides mean the same.

    `holds` names the newest model (see `Broadcast.model`) that it still has from before; "" is none.
    """

    run_id: str
    layout_digest: str
    catalogue_digest: str
    config_digest: str
    num_train: int
    num_validation: int
    num_left_out: int
    holds: str = ""


class Purpose(StrEnum):
    """What to do with a broadcast model."""

    TRAIN = "train"
    EVALUATE = "evaluate"
    COMPARE = "compare"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDelta:
    """One difference between two models, each named by the digest of its values. Its vectors are in the broadcast.

    Attributes:
        base: the model that the difference is added to; "" where it is the whole model.
        model: the model that it leads to.
    """

    base: str
    model: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Broadcast:
    """The server hands out work.

    Attributes:
        key: names the work.
        purpose: what to do with the model.
        client_lr: learning rate of local training.
        vectors: the model and what the algorithm adds. A plain model is `params` [S]: the shared values after
            `key.round - 1` rounds or, to evaluate and to compare, after `key.round`. Where downloads are compressed,
            the i-th of `deltas` has the encoded vectors `i/trainable` [T] and `i/statistics` [S - T] instead.
        model: digest of the float32 values [S] that all clients decode to the last bit; "" where the model is plain.
        deltas: lead from a model that the client holds to `model`, one after the other. None where it holds `model`.
        counted: this client's newest upload that the server counted: state pending for that key is committed, any
            other pending state is rolled back.
        num_steps: local steps to take; None: as many as the configured epochs have.
        num_rounds: to compare, how many rounds a model trained alone is given; None: `key.round`.
    """

    key: TaskKey
    purpose: Purpose
    client_lr: float
    vectors: Mapping[str, Vector] = field(default_factory=dict)
    model: str = ""
    deltas: tuple[ModelDelta, ...] = ()
    counted: TaskKey | None = None
    num_steps: int | None = None
    num_rounds: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the model travels as it is."""
        return PARAMS in self.vectors

    @property
    def params(self) -> Tensor:
        """[S]: the model of a plain broadcast."""
        return _plain(self.vectors, PARAMS)

    @property
    def auxiliary(self) -> Mapping[str, Tensor]:
        """What the algorithm adds, each [T]."""
        return _auxiliary(self.vectors)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Upload:
    """What one client's training changed.

    Attributes:
        key: the work that it answers.
        vectors: a plain upload has `delta` [S], local minus global: *add* it to move toward the client. Encoded, that
            is `trainable` [T] and `statistics` [S - T]. What the algorithm adds (control variates, for example) is
            payload like any other.
        num_examples: photos trained on.
        num_steps: local steps taken.
        train_loss: mean loss over local training, in nats.
        seconds: time that training took.
        batch_size: of local training.
        client_lr: learning rate of local training.
    """

    key: TaskKey
    vectors: Mapping[str, Vector]
    num_examples: int
    num_steps: int
    train_loss: float
    seconds: float
    batch_size: int | None = None
    client_lr: float | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the delta is not encoded."""
        return DELTA in self.vectors

    @property
    def delta(self) -> Tensor:
        """[S]: the delta of a plain upload."""
        return _plain(self.vectors, DELTA)

    @property
    def auxiliary(self) -> Mapping[str, Tensor]:
        """What the algorithm adds, each [T]."""
        return _auxiliary(self.vectors)

    def with_vectors(self, **vectors: Vector) -> "Upload":
        """The same upload with some of its vectors replaced."""
        return replace(self, vectors={**self.vectors, **vectors})

    def with_auxiliary(self, **vectors: Tensor) -> "Upload":
        """The same upload with what an algorithm adds."""
        return self.with_vectors(**auxiliary_vectors(vectors))


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """How the broadcast model does on the client's own validation photos: counts and the sum of losses (nats)."""

    key: TaskKey
    num_examples: int
    num_correct: int
    loss_sum: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Comparison:
    """How the models that a store can choose among do there, and which of them it keeps.

    `accuracies` are fractions of the store's own mix of products, on test photos where the client has some
    (`on_test`), else on its validation photos. `best` was chosen on the `num_validation` validation photos.
    """

    key: TaskKey
    best: Candidate
    accuracies: Mapping[Candidate, float]
    on_test: bool
    num_validation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The client could not do the work.

    Attributes:
        reason: for a person.
        key: the task; None where none was named.
        will_repeat: the client would fail again if it were asked again.
    """

    reason: str
    key: TaskKey | None = None
    will_repeat: bool = False


ServerMessage: TypeAlias = Setup | Broadcast
ClientMessage: TypeAlias = Join | Ready | Upload | Evaluation | Comparison | Failure


def task_key(message: ServerMessage) -> TaskKey | None:
    """The key of the work that `message` hands out; None if it is none."""
    return message.key if isinstance(message, Broadcast) else None
