"""What happens in a run, as facts that sinks (database, console, …) write down.

Accuracies are fractions in [0, 1], losses nats, times seconds, sizes bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from fedshelf.core.choices import Candidate


class ClientStatus(StrEnum):
    """How a member of the cohort ended a round."""

    COUNTED = "counted"
    LATE = "late"
    REFUSED = "refused"
    FAILED = "failed"
    OFFLINE = "offline"


class RunStatus(StrEnum):
    """How a run stands; `running` with a dead process reads as stopped."""

    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, kw_only=True, slots=True)
class Participation:
    """One cohort member's round. `reason` says why it was not counted, or what was done to an upload that was (empty:
    nothing); `accuracy` is of the model after the round on the client's own validation photos. `num_steps`,
    `batch_size` and `client_lr` are those of its training. Where rounds are asynchronous, `number` counts the client's
    uploads in the round, and `staleness` is how many versions the model had advanced meanwhile."""

    client: str
    status: ClientStatus
    reason: str = ""
    num_examples: int | None = None
    train_loss: float | None = None
    accuracy: float | None = None
    seconds: float | None = None
    num_steps: int | None = None
    batch_size: int | None = None
    client_lr: float | None = None
    staleness: int | None = None
    number: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStarted:
    """`first_round` is the round that comes next: above 1 where the run was resumed. `num_test` is how many photos the
    server tests on (None: it has none), `num_test_left_out` how many more it has, of products that no client holds."""

    run_id: str
    num_rounds: int
    first_round: int
    num_parameters: int
    num_classes: int
    min_clients: int
    num_test: int | None = None
    num_test_left_out: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsLoaded:
    """A new run starts from the weights in a file, the rows of its head matched by the names of their classes.

    Attributes:
        file: its name.
        kept: classes whose row is where it was.
        moved: classes whose row is at another position now.
        added: classes that the file does not have; their rows start fresh.
        dropped: classes that the run does not have.
        reason: why the whole head starts fresh; empty where rows were taken over.
    """

    file: str
    kept: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientJoined:
    """A client can be asked from now on, for the first time or again. `num_left_out` counts photos of classes that the
    catalogue does not have."""

    client: str
    num_train: int
    num_validation: int
    num_left_out: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientRefused:
    """Somebody who may not take part, or a message that was not accepted outside of a client's own round."""

    client: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientLeft:
    """A connection is lost, set up or not; the client may come back."""

    client: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """The server has been waiting for a while. Repeated at growing intervals.

    Attributes:
        what: what for, as a phrase: "3 clients to start".
        live: clients that are there.
        missing: clients that are awaited by name; empty where any will do.
        seconds: since when.
    """

    what: str
    live: tuple[str, ...]
    missing: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientExcluded:
    """A client takes no further part in the run until it is started again: what it was asked to do will fail again."""

    client: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundStarted:
    """Work is about to be handed out. `attempt` counts from 0; where rounds are asynchronous, `cohort` is who is at
    work already."""

    round: int
    attempt: int
    cohort: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class UploadReceived:
    """One cohort member has answered, well or not; `num_done` of `num_cohort` have."""

    round: int
    client: str
    status: ClientStatus
    reason: str
    num_done: int
    num_cohort: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundVoid:
    """An attempt that ended without a quorum; the round is tried again."""

    round: int
    attempt: int
    reason: str
    clients: tuple[Participation, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundFinished:
    """A version is made. `accuracy` is on the clients' validation photos, `central_accuracy` and `central_loss` are on
    the server's test photos (None: not measured in this round), `train_loss` is the mean over the training that led to
    it. Bytes are payload on the wire, all clients together. `virtual_seconds`, of a simulation, has those of void
    attempts in it."""

    round: int
    attempt: int
    clients: tuple[Participation, ...]
    train_loss: float | None
    accuracy: float | None
    central_accuracy: float | None
    central_loss: float | None
    seconds: float
    bytes_up: int
    bytes_down: int
    best_round: int | None
    virtual_seconds: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreComparison:
    """How the models that one store can choose among do there, and which of them it keeps (`core.messages.Comparison`).
    Where there is none, `reason` says why."""

    client: str
    best: Candidate | None
    accuracies: Mapping[Candidate, float]
    on_test: bool
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonStarted:
    """The rounds are over, and `stores` are asked which model serves them best. That takes as long as the rounds took,
    for each trains a model alone."""

    round: int
    stores: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonReceived:
    """One store has answered, well or not (`reason`); `num_done` of `num_stores` have."""

    round: int
    client: str
    reason: str
    num_done: int
    num_stores: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StoresCompared:
    """After the last round, what became of it at each store."""

    round: int
    stores: tuple[StoreComparison, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEnded:
    """The server is about to close. A run that was `stopped` can be gone on with."""

    status: RunStatus
    reason: str = ""


Event: TypeAlias = (
    RunStarted
    | WeightsLoaded
    | ClientJoined
    | ClientRefused
    | ClientLeft
    | ClientExcluded
    | Waiting
    | RoundStarted
    | UploadReceived
    | RoundVoid
    | RoundFinished
    | ComparisonStarted
    | ComparisonReceived
    | StoresCompared
    | RunEnded
)
