"""State that must survive a crash, saved and loaded as a whole.

Shapes: S shared values of the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedshelf.core.choices import Metric
from fedshelf.core.messages import TaskKey

SCHEMA_VERSION = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """The best round so far.

    Attributes:
        round: the round.
        value: value of `metric`, where more is better (a loss is negated).
        metric: the metric compared.
    """

    round: int
    value: float
    metric: Metric


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspension:
    """The exclusion of a client for some rounds.

    Attributes:
        last_round: the last round without it.
        reason: why it is excluded.
    """

    last_round: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class InFlight:
    """A task that was in flight when the state was saved, in asynchronous rounds and in simulations.

    Attributes:
        client: the client at work.
        key: the task.
        due: when the reply is due, in virtual seconds; None in real time.
        leaves: when a simulated client aborts the task, in virtual seconds; it then returns at `due`.
        wanted: whether the reply is still used; otherwise it is late, but keeps its client busy.
    """

    client: str
    key: TaskKey
    due: float | None = None
    leaves: float | None = None
    wanted: bool = True


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ModelState:
    """The global model and what updates it: all that an algorithm sees and changes.

    Attributes:
        params: the global model [S].
        sent: the model that clients decode [S], if downloads are compressed with loss; None: clients hold `params`.
        optimizer: vectors of the server optimizer.
        mean: the mean of the last models so far [S], if they are averaged.
    """

    params: Tensor
    sent: Tensor | None = None
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    mean: Tensor | None = None

    @property
    def published(self) -> Tensor:
        """[S]: the model as clients hold it, which is trained, evaluated and published."""
        return self.params if self.sent is None else self.sent


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ServerState:
    """The server's state after `round` completed rounds: the model, and the bookkeeping of the run.

    Attributes:
        round: completed rounds.
        model: the global model.
        counted: by client, its newest counted upload.
        times_live: by client, the number of rounds in which it was live when the cohort was drawn.
        best: the best round so far.
        void_rounds: attempts that ended without a quorum.
        pace: by client, seconds per local step.
        evaluated: in asynchronous rounds, by client, the correct and all validation photos of its last evaluation.
        virtual_seconds: time of a simulation's clock.
        in_flight: tasks in flight.
        compared: the round after which stores last compared models.
        refits: the rounds after the last of a run, which computed the output layer anew.
        classes: digest of the class names that the rows of the model's head stand for.
        suspended: by client, its exclusion for some rounds.
        photos: if uploads are sums over photos, by client, the photos that its counted uploads stand for.
        clip_norm: the next round's norm of uploads, if it adapts.
    """

    round: int
    model: ModelState
    counted: Mapping[str, TaskKey] = field(default_factory=dict)
    times_live: Mapping[str, int] = field(default_factory=dict)
    best: Best | None = None
    void_rounds: int = 0
    pace: Mapping[str, float] = field(default_factory=dict)
    evaluated: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    virtual_seconds: float = 0.0
    in_flight: tuple[InFlight, ...] = ()
    compared: int = 0
    refits: tuple[int, ...] = ()
    classes: str = ""
    suspended: Mapping[str, Suspension] = field(default_factory=dict)
    photos: Mapping[str, int] = field(default_factory=dict)
    clip_norm: float | None = None

    @property
    def is_refitted(self) -> bool:
        """Whether the newest round computed the output layer anew."""
        return self.round in self.refits

    @property
    def unused_attempt(self) -> int:
        """An attempt that no training task used, so that a late reply to one does not match."""
        keys = (*self.counted.values(), *(flight.key for flight in self.in_flight))
        return 1 + max((key.attempt for key in keys), default=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenRound:
    """A round in progress, saved before the first task is sent so that a restarted server can resume it.

    Attributes:
        key: the round and attempt.
        cohort: the clients asked.
        live: the clients that were live when the cohort was drawn. A restarted server gives them time to return;
            otherwise it would favor those that reconnect quickly in the next cohort.
        wanted: number of uploads that suffice; None: those of the whole cohort.
        num_steps: by member, local steps of the configured epochs, if work is assigned by steps.
        pace: by member, predicted seconds per local step when the cohort was drawn.
        noise_key: secret key of the noise that is added to the sum; None without.
        masking: the public record of the masks, once it is fixed whose uploads are added up; "" before, and without.
        encryption: the public record of homomorphic encryption (`rounds.key_exchange`); "" without.
        classes: digest of the class names of the model that the round trains; "" if it was opened by a version that
            did not say.
    """

    key: TaskKey
    cohort: tuple[str, ...]
    live: tuple[str, ...] = ()
    wanted: int | None = None
    num_steps: Mapping[str, int] = field(default_factory=dict)
    pace: Mapping[str, float] = field(default_factory=dict)
    noise_key: bytes | None = field(default=None, repr=False)
    masking: str = ""
    encryption: str = ""
    classes: str = ""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClientState:
    """State that stays at a client between rounds. Each subsystem has its own slot.

    Attributes:
        algorithm: the algorithm's state, such as control variates.
        personalization: the store's own tensors.
        pipeline: by stage of the upload pipeline, what it carries over to the next upload.
        num_classes: the classes of the model that it belongs to; 0 if it does not say.
    """

    algorithm: Mapping[str, Tensor] = field(default_factory=dict)
    personalization: Mapping[str, Tensor] = field(default_factory=dict)
    pipeline: Mapping[str, Tensor] = field(default_factory=dict)
    num_classes: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether all slots are empty."""
        return not (self.algorithm or self.personalization or self.pipeline)
