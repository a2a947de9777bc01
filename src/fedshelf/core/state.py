"""Everything that must survive a crash, saved and loaded whole.

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
    """The best round so far: `value` of `metric`, as a number of which more is better (a loss is negative)."""

    round: int
    value: float
    metric: Metric


@dataclass(frozen=True, kw_only=True, slots=True)
class InFlight:
    """A task that was out when the state was saved, in asynchronous rounds and in simulations: whose, which, and when
    its answer is due (virtual seconds; None where time is real). A simulated client may break it off before that, when
    it `leaves` (virtual seconds), and be back when the answer would have been due. What is not `wanted` any more was
    too late, but keeps its client busy."""

    client: str
    key: TaskKey
    due: float | None = None
    leaves: float | None = None
    wanted: bool = True


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ServerState:
    """The server after `round` completed rounds.

    `params` is the global model [S]; `sent` is the model that clients decode [S] where downloads are compressed with
    loss (None: clients hold `params`); `optimizer` holds the server optimizer's vectors; `counted` names, per
    client, the newest upload that was counted; `times_live`, in how many rounds it was there when the cohort was
    drawn; `void_rounds` counts attempts that ended without a quorum; `pace` is each client's, in seconds per local
    step; `evaluated` is how many validation photos each got right of how many when it was last asked, in asynchronous
    rounds; `virtual_seconds` is what a simulation's clock shows; `compared` is the round after which stores last
    compared models; `classes` is the digest of the names that the rows of the model's head belong to.
    """

    round: int
    params: Tensor
    sent: Tensor | None = None
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    counted: Mapping[str, TaskKey] = field(default_factory=dict)
    times_live: Mapping[str, int] = field(default_factory=dict)
    best: Best | None = None
    void_rounds: int = 0
    pace: Mapping[str, float] = field(default_factory=dict)
    evaluated: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    virtual_seconds: float = 0.0
    in_flight: tuple[InFlight, ...] = ()
    compared: int = 0
    classes: str = ""

    @property
    def model(self) -> Tensor:
        """[S]: the model as clients have it, which is what is trained on, evaluated and published."""
        return self.params if self.sent is None else self.sent


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenRound:
    """The round in flight, written down before the first task goes out: a restarted server goes on with it.

    `live` is everybody who was there when the cohort was drawn: a restarted server gives them time to come back,
    or it would draw the next cohort among those who were quicker. `wanted` is how many uploads are enough (None: the
    whole cohort's). Where somebody counts them, `num_steps` is how many local steps the configured epochs have at each
    member, and `pace` how many seconds each is predicted to take for one, as it was when the cohort was drawn.
    """

    key: TaskKey
    cohort: tuple[str, ...]
    live: tuple[str, ...] = ()
    wanted: int | None = None
    num_steps: Mapping[str, int] = field(default_factory=dict)
    pace: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClientState:
    """What stays at a client between rounds. Each part of the system has a slot of its own.

    Attributes:
        algorithm: what the algorithm keeps: control variates, for example.
        personalization: tensors that are the store's own.
        pipeline: by the name of a stage of the upload pipeline, what that carries over to the next upload.
    """

    algorithm: Mapping[str, Tensor] = field(default_factory=dict)
    personalization: Mapping[str, Tensor] = field(default_factory=dict)
    pipeline: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is kept."""
        return not (self.algorithm or self.personalization or self.pipeline)
