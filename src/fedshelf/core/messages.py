"""What the server and a client say to each other. All are frozen; none names a file or holds a photo.

    client                     server
      Join        ──────────▶            who I am, which classes I hold
                  ◀──────────  Setup     the run's configuration, the catalogue, the layout's digest
      Ready       ──────────▶            how many photos that leaves me with
                  ◀──────────  Broadcast train (or evaluate) this model
      Upload      ──────────▶            what training changed
      Evaluation  ──────────▶            how the model does on my validation photos
      Comparison  ──────────▶            which model serves me best, once the rounds are over
      Failure     ──────────▶            why there is neither

Where a run compresses, a `CompressedBroadcast` and a `CompressedUpload` travel in place of the two.

Everything that leaves a client is one of these objects and nothing else (docs/explanation/what-leaves-a-store.md).
Shapes: S shared values of the model (see `params`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from torch import Tensor

from fedshelf.core.choices import Candidate
from fedshelf.core.encoded import Encoded

RUN_FINISHED = "the run is finished"
"""What a server tells its clients at the end of a run that did not fail."""
PROTOCOL_VERSION = 3
TRAINABLE, STATISTICS, AUXILIARY = "trainable", "statistics", "auxiliary."
"""What the vectors of an upload are called: the two parts of its delta, and the prefix of those beside it."""


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class TaskKey:
    """Names one piece of work for ever; the same key asked twice is answered with the same bytes."""

    run_id: str
    round: int
    attempt: int


def keyed(purpose: str, key: TaskKey) -> str:
    """What a draw for the task `key` is for: another attempt at a round is other work, and draws anew."""
    return f"{purpose}-again-{key.attempt}" if key.attempt else purpose


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class ClassFolder:
    """A class as a client sees it: the folder's own name, and its path below the data folder ('/' between)."""

    leaf: str
    path: str


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

    `holds` names the newest model (see `CompressedBroadcast`) that it still has from before; "" is none.
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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Broadcast:
    """The server hands out work: the shared values [S] as they are after `key.round - 1` rounds (or, to evaluate and
    to compare, after `key.round`).

    `counted` is the key of this client's newest upload that the server counted: state the client holds pending
    for that key is committed, any other pending state is rolled back. `num_steps` is how many local steps to take
    (None: as many as the configured epochs have); `num_rounds`, to compare, how many rounds a model trained alone is
    given (None: `key.round`).
    """

    key: TaskKey
    purpose: Purpose
    params: Tensor
    client_lr: float
    auxiliary: Mapping[str, Tensor] = field(default_factory=dict)
    counted: TaskKey | None = None
    num_steps: int | None = None
    num_rounds: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Upload:
    """What one client's training changed.

    `delta` [S] is local minus global: *add* it to move toward the client. `auxiliary` vectors (control variates,
    say) are payload like any other. `num_examples` counts photos, `train_loss` is their mean loss in nats over
    the local training, `seconds` the time it took. `batch_size` and `client_lr` are what it trained with.
    """

    key: TaskKey
    delta: Tensor
    num_examples: int
    num_steps: int
    train_loss: float
    seconds: float
    auxiliary: Mapping[str, Tensor] = field(default_factory=dict)
    batch_size: int | None = None
    client_lr: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Step:
    """The way from one model to the next: the model named `base`, plus `vectors` ("trainable" [T], "statistics"
    [S - T]), is the model named `model`. Where `base` is "", the way begins at zero."""

    base: str
    model: str
    vectors: Mapping[str, Encoded]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CompressedBroadcast:
    """A `Broadcast` as differences to a model that the client holds.

    `model` is the digest of the float32 values [S] that all clients decode to the last bit; `steps` lead there one
    after the other. There are none where the client holds the model already.
    """

    key: TaskKey
    purpose: Purpose
    model: str
    steps: tuple[Step, ...]
    client_lr: float
    auxiliary: Mapping[str, Tensor] = field(default_factory=dict)
    counted: TaskKey | None = None
    num_steps: int | None = None
    num_rounds: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CompressedUpload:
    """An `Upload` with its vectors encoded: "trainable" [T], "statistics" [S - T], and "auxiliary." + name."""

    key: TaskKey
    vectors: Mapping[str, Encoded]
    num_examples: int
    num_steps: int
    train_loss: float
    seconds: float
    batch_size: int | None = None
    client_lr: float | None = None


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
    """The client could not do the work; `reason` is for a person. `key` is absent where no task was named."""

    reason: str
    key: TaskKey | None = None


Task: TypeAlias = Broadcast | CompressedBroadcast
"""Work for a client."""
ServerMessage: TypeAlias = Setup | Broadcast | CompressedBroadcast
ClientMessage: TypeAlias = Join | Ready | Upload | CompressedUpload | Evaluation | Comparison | Failure


def task_key(message: ServerMessage) -> TaskKey | None:
    """The key of the work that `message` hands out; None if it is none."""
    return message.key if isinstance(message, Broadcast | CompressedBroadcast) else None
