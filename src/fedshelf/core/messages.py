"""The messages between the server and a client. All are frozen; none contains a file name or a photo.

    client                     server
      Join        ──────────▶            the client's identity and classes
                  ◀──────────  Setup     the run's configuration, the catalogue, the layout's digest
      Ready       ──────────▶            the number of photos
                  ◀──────────  MaskingRequest one stage of the exchange that makes and opens masks
      MaskingReply ─────────▶            the client's part in it
                  ◀──────────  EncryptionRequest one step of handing out keys, or a sum to decrypt
      EncryptionReply ──────▶            the client's part in it
                  ◀──────────  Broadcast train, evaluate or compare this model
      Upload      ──────────▶            the difference that training made
      Evaluation  ──────────▶            the model's score on the validation photos
      Comparison  ──────────▶            the model that serves the store best, after the last round
      Failure     ──────────▶            why there is no result, or why the store's policy refuses the task

A `Setup`, a `Broadcast`, an `Upload` and the messages of encryption carry named vectors. Each is plain (a `Tensor`) or,
but for a setup's, `Encoded` by the run's codec.

Everything that leaves a client is one of these objects (docs/explanation/what-leaves-a-store.md). Shapes: S shared
and F frozen values of the model (see `params`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Annotated, TypeAlias

from torch import Tensor

from fedshelf.core.bounds import Bounds, Count, FiniteFloat, Identifier, NonNegativeFloat, RoundNumber, StrictBool, Text
from fedshelf.core.choices import Candidate
from fedshelf.core.class_folder import MAX_CLASSES, MAX_DEPTH
from fedshelf.core.class_folder import ClassFolder as ClassFolder
from fedshelf.core.class_folder import ProductCount as ProductCount
from fedshelf.core.encoded import Encoded
from fedshelf.core.errors import RefusedError

PROTOCOL_VERSION = 10
MAX_CANDIDATES = 64
"""Maximum number of models that a store is asked to choose among."""
RUN_FINISHED = "the run is finished"
"""The reason that a server gives its clients at the end of a successful run."""
WITHDRAWN = "the photos of this store are no longer in the model"
"""How the reason begins that a server gives a client which has withdrawn, once that is saved."""

NOTHING_TO_WITHDRAW = "no photo of this store is in the model, so there is nothing to withdraw"
"""The reason that a server gives a client which wants to withdraw and never took part."""

Vector: TypeAlias = Tensor | Encoded
PARAMS, DELTA, FROZEN = "params", "delta", "frozen"
"""Names of the main vector: [S] in a plain broadcast and in a plain upload, [F] in a setup."""
CANDIDATES = "candidates"
"""Name of the auxiliary vector of an evaluation's broadcast that holds models to choose among."""
TRAINABLE, STATISTICS, AUXILIARY = "trainable", "statistics", "auxiliary."
TEACHER = AUXILIARY + "teacher"
"""Names of the two segments of an encoded main vector, and the prefix of vectors that an algorithm adds."""


def auxiliary_vectors(vectors: Mapping[str, Tensor]) -> dict[str, Vector]:
    """Add the `AUXILIARY` prefix to the names of an algorithm's vectors."""
    return {AUXILIARY + name: vector for name, vector in vectors.items()}


class _Auxiliary(dict[str, Tensor]):
    def __missing__(self, name: str) -> Tensor:
        raise RefusedError(f"the message comes without the vector {name!r}")


def _auxiliary(vectors: Mapping[str, Vector]) -> dict[str, Tensor]:
    return _Auxiliary(
        {
            name.removeprefix(AUXILIARY): vector
            for name, vector in vectors.items()
            if name.startswith(AUXILIARY) and isinstance(vector, Tensor)
        }
    )


def _plain(vectors: Mapping[str, Vector], name: str) -> Tensor:
    vector = vectors[name]
    if not isinstance(vector, Tensor):
        raise TypeError(f"vector {name!r} is still encoded")
    return vector


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class TaskKey:
    """Identifies a task uniquely. A repeated request with the same key gets the same bytes in reply."""

    run_id: Identifier
    round: RoundNumber
    attempt: RoundNumber


def keyed(purpose: str, key: TaskKey) -> str:
    """The random purpose of a draw for the task `key`. Each further attempt at a round draws anew."""
    return f"{purpose}-again-{key.attempt}" if key.attempt else purpose


@dataclass(frozen=True, kw_only=True, slots=True)
class Join:
    """A client introduces itself.

    Attributes:
        protocol: version of the protocol.
        version: version of FedShelf.
        client: the client's name.
        classes: the class folders that the client holds; empty if it withdraws, or its policy withholds their names.
        withdraws: whether the client asks for its photos to be taken out of the model.
    """

    protocol: RoundNumber
    version: Identifier
    client: Identifier
    classes: Annotated[tuple[ClassFolder, ...], Bounds(max_length=MAX_CLASSES)]
    withdraws: StrictBool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """Everything a client needs before its first round.

    Attributes:
        frozen: digest of the values that never change; "" if all do.
        vectors: these values, `frozen` [F]; and those of the teacher, `auxiliary.teacher` [V]; empty if there are none.
        run_id: the run.
        config: the client's part of the run's configuration (TOML text).
        catalogue: maps class index to name and member paths (JSON text).
        layout_digest: digest of the model's layout.
        teacher: the model that stores learn from, without its values (JSON text); "" for none.
    """

    run_id: Identifier
    config: Text
    catalogue: Text
    layout_digest: Identifier
    frozen: Identifier = ""
    teacher: Text = ""
    vectors: Mapping[str, Vector] = field(default_factory=dict, compare=False)

    @property
    def frozen_values(self) -> Tensor | None:
        """[F]: the values that never change; None if all do."""
        return _plain(self.vectors, FROZEN) if FROZEN in self.vectors else None

    @property
    def teacher_values(self) -> Tensor | None:
        """[V]: the values of the model that stores learn from; None if they learn from none."""
        return _plain(self.vectors, TEACHER) if TEACHER in self.vectors else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """The client has built the model. The digests prove that both sides agree.

    Attributes:
        run_id: the run.
        layout_digest: digest of the model's layout.
        catalogue_digest: digest of the catalogue.
        config_digest: digest of the configuration.
        num_train: training photos; None if withheld.
        num_validation: validation photos; None if withheld.
        num_left_out: photos of classes missing from the catalogue; None if withheld.
        holds: the newest model (see `Broadcast.model`) that the client still holds; "" for none.
    """

    run_id: Identifier
    layout_digest: Identifier
    catalogue_digest: Identifier
    config_digest: Identifier
    num_train: Count | None
    num_validation: Count | None
    num_left_out: Count | None
    holds: Identifier = ""


class Purpose(StrEnum):
    """What a client does with a broadcast model."""

    TRAIN = "train"
    EVALUATE = "evaluate"
    COMPARE = "compare"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDelta:
    """One difference between two models, each identified by the digest of its values. The broadcast holds its vectors.

    Attributes:
        base: the model that the difference is added to; "" if the difference is the whole model.
        model: the resulting model.
    """

    base: Identifier
    model: Identifier


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Broadcast:
    """The server dispatches a task.

    Attributes:
        key: identifies the task.
        purpose: what to do with the model.
        client_lr: learning rate of local training.
        vectors: the model and the algorithm's vectors. A plain model is `params` [S]: the shared values after
            `key.round - 1` rounds to train, or after `key.round` rounds to evaluate and compare. Where downloads are
            compressed, the i-th of `deltas` has the encoded vectors `i/trainable` [T] and `i/statistics` [S - T]
            instead.
        model: digest of the float32 values [S], which all clients decode bit for bit; "" if the model is plain.
        deltas: lead step by step from a model that the client holds to `model`; empty if it holds `model`.
        counted: this client's newest upload that the server counted. Pending state for that key is committed, any other
            pending state is rolled back.
        num_steps: local steps to take; None: as many as the configured epochs have.
        num_rounds: to compare, the rounds of a model trained locally; None: `key.round`.
        per_product: to evaluate, whether to count by product, too.
        quorum: to train, the minimum number of stores whose uploads are aggregated; None if there is none.
        masking: to train or evaluate, the shares of other stores' secrets for this one, if uploads are masked.
        clip_norm: to train, the norm that the store scales its upload down to, if the server cannot; None: it does not.
    """

    key: TaskKey
    purpose: Purpose
    client_lr: NonNegativeFloat
    vectors: Mapping[str, Vector] = field(default_factory=dict)
    model: Identifier = ""
    deltas: tuple[ModelDelta, ...] = ()
    counted: TaskKey | None = None
    closed_form: StrictBool = False
    num_steps: Count | None = None
    num_rounds: RoundNumber | None = None
    per_product: StrictBool = False
    quorum: Count | None = None
    masking: Text = ""
    clip_norm: NonNegativeFloat | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the model is not encoded."""
        return PARAMS in self.vectors

    @property
    def params(self) -> Tensor:
        """[S]: the model of a plain broadcast."""
        return _plain(self.vectors, PARAMS)

    @property
    def auxiliary(self) -> Mapping[str, Tensor]:
        """The algorithm's vectors by name, each [T]."""
        return _auxiliary(self.vectors)

    @property
    def masked_purpose(self) -> "MaskedPurpose":
        """What the reply is summed for, if it is masked."""
        if self.purpose is Purpose.TRAIN:
            return MaskedPurpose.CLOSED_FORM if self.closed_form else MaskedPurpose.TRAIN
        return MaskedPurpose.CHOOSE if AUXILIARY + CANDIDATES in self.vectors else MaskedPurpose.EVALUATE


class MaskingStage(StrEnum):
    """A stage of secure aggregation besides training (see `privacy.secure_aggregation`)."""

    KEYS = "keys"
    SHARES = "shares"
    SURVIVORS = "survivors"
    UNMASKING = "unmasking"


class MaskedPurpose(StrEnum):
    """What members of a round compute under masks. Each has keys and masks of its own."""

    TRAIN = "train"
    CLOSED_FORM = "closed-form"
    CHOOSE = "choose"
    EVALUATE = "evaluate"


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskingRequest:
    """The server's message of one stage of secure aggregation.

    Attributes:
        key: the round's task.
        stage: the stage.
        content: the message (`privacy.secure_aggregation.wire`).
        purpose: what is summed.
    """

    key: TaskKey
    stage: MaskingStage
    content: Text
    purpose: MaskedPurpose = MaskedPurpose.TRAIN


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskingReply:
    """The client's message of one stage of secure aggregation.

    Attributes:
        key: the round's task.
        stage: the stage.
        content: the message.
        purpose: what is summed.
    """

    key: TaskKey
    stage: MaskingStage
    content: Text
    purpose: MaskedPurpose = MaskedPurpose.TRAIN


class EncryptionStage(StrEnum):
    """A step of homomorphic encryption besides training (see `privacy.homomorphic`)."""

    KEYS = "keys"
    REQUEST = "request"
    WRAP = "wrap"
    DELIVERY = "delivery"
    DECRYPTION = "decryption"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EncryptionRequest:
    """The server's message of one step of homomorphic encryption.

    Attributes:
        key: the round's task.
        stage: the step.
        content: the message (`privacy.homomorphic.key_messages`).
        vectors: to decrypt, the encrypted `sum`.
    """

    key: TaskKey
    stage: EncryptionStage
    content: Text
    vectors: Mapping[str, Vector] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EncryptionReply:
    """The client's message of one step of homomorphic encryption.

    Attributes:
        key: the round's task.
        stage: the step.
        content: the message.
        vectors: the decrypted `sum`, if that was asked for.
    """

    key: TaskKey
    stage: EncryptionStage
    content: Text
    vectors: Mapping[str, Vector] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mechanism:
    """The noise in an upload: sums of bounded values of randomly drawn photos, each with Gaussian noise.

    Attributes:
        noise_multiplier: standard deviation of the noise, as a multiple of the bound.
        sampling_rate: probability with which each photo takes part in a sum.
        steps: number of sums.
    """

    noise_multiplier: NonNegativeFloat
    sampling_rate: Annotated[float, Bounds(ge=0, le=1)]
    steps: Count


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Upload:
    """The difference that one client's training made.

    Attributes:
        key: the task that it answers.
        vectors: a plain upload has `delta` [S], local minus global: *add* it to move toward the client. An encoded one
            has `trainable` [T] and `statistics` [S - T]. The algorithm's vectors (such as control variates) are
            payload, too.
        num_examples: photos trained on; None if withheld.
        num_steps: local steps taken; None if withheld.
        train_loss: mean loss over local training, in nats; None if nothing was trained in steps, or it is withheld.
        seconds: duration of training; None if withheld.
        batch_size: batch size of local training.
        client_lr: learning rate of local training.
        mechanism: the noise in the vectors; None: there is none.
        tag: of an encrypted upload, what proves to the store that decrypts that it is in the sum; "" of others.
    """

    key: TaskKey
    vectors: Mapping[str, Vector]
    num_examples: Count | None
    num_steps: Count | None
    train_loss: FiniteFloat | None
    seconds: NonNegativeFloat | None
    batch_size: Count | None = None
    client_lr: NonNegativeFloat | None = None
    mechanism: Mechanism | None = None
    tag: Text = ""

    @property
    def is_plain(self) -> bool:
        """Whether the delta is not encoded."""
        return DELTA in self.vectors

    @property
    def weight(self) -> int:
        """The photos that it weighs as: one, if their number is withheld."""
        return 1 if self.num_examples is None else self.num_examples

    @property
    def delta(self) -> Tensor:
        """[S]: the delta of a plain upload."""
        return _plain(self.vectors, DELTA)

    @property
    def plain_vectors(self) -> Mapping[str, Tensor]:
        """All vectors of a plain upload by name."""
        return {name: _plain(self.vectors, name) for name in self.vectors}

    @property
    def auxiliary(self) -> Mapping[str, Tensor]:
        """The algorithm's vectors by name, each [T]."""
        return _auxiliary(self.vectors)

    def with_vectors(self, **vectors: Vector) -> "Upload":
        """A copy of the upload with some vectors replaced."""
        return replace(self, vectors={**self.vectors, **vectors})

    def with_auxiliary(self, **vectors: Tensor) -> "Upload":
        """A copy of the upload with an algorithm's vectors added."""
        return self.with_vectors(**auxiliary_vectors(vectors))


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateScore:
    """The score of one of several models to choose among, on the client's own validation photos.

    Attributes:
        num_correct: photos classified correctly.
        losses: sum of the losses in nats, at each of the algorithm's temperatures.
    """

    num_correct: Count
    losses: Annotated[tuple[FiniteFloat, ...], Bounds(max_length=MAX_CANDIDATES)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The broadcast model's score on the client's own validation photos.

    Attributes:
        key: the task that it answers.
        num_examples: photos evaluated.
        num_correct: photos classified correctly.
        loss_sum: sum of the losses in nats; None if withheld.
        candidates: scores of the models to choose among, if the broadcast holds some; empty if withheld.
        products: the same counts for each product that has photos, by index; empty if they were not asked for, or the
            store withholds them.
        levels: photos whose prediction lies in the correct folder, by level of the product tree, coarsest first; empty
            like `products`.
        masked: all of these numbers under masks, if uploads are masked; the others are then zero or empty.
    """

    key: TaskKey
    num_examples: Count
    num_correct: Count
    loss_sum: FiniteFloat | None
    candidates: Annotated[tuple[CandidateScore, ...], Bounds(max_length=MAX_CANDIDATES)] = ()
    products: Annotated[tuple[ProductCount, ...], Bounds(max_length=MAX_CLASSES)] = ()
    levels: Annotated[tuple[Count, ...], Bounds(max_length=MAX_DEPTH)] = ()
    masked: Text = ""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Comparison:
    """How the candidate models do at a store, and which of them it keeps.

    Attributes:
        key: the task that it answers.
        best: the model kept, chosen on the validation photos; None if withheld.
        accuracies: accuracy of each candidate, weighted by the store's class distribution; empty if withheld.
        on_test: whether accuracies are measured on test photos; otherwise on validation photos.
        num_validation: the client's validation photos; None if withheld.
    """

    key: TaskKey
    best: Candidate | None
    accuracies: Mapping[Candidate, FiniteFloat]
    on_test: StrictBool
    num_validation: Count | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The client could not do the task.

    Attributes:
        reason: for a person.
        key: the task; None if the message named none.
        will_repeat: whether a retry would fail, too.
        refused: whether the store's policy does not allow the task.
    """

    reason: Text
    key: TaskKey | None = None
    will_repeat: StrictBool = False
    refused: StrictBool = False


ServerMessage: TypeAlias = Setup | Broadcast | MaskingRequest | EncryptionRequest
ClientMessage: TypeAlias = Join | Ready | Upload | Evaluation | Comparison | MaskingReply | EncryptionReply | Failure


def task_key(message: ServerMessage) -> TaskKey | None:
    """The key of the task that `message` dispatches; None if it dispatches none."""
    return None if isinstance(message, Setup) else message.key
