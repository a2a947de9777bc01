"""Events of a run, as recorded by sinks such as the database and the console.

Units: accuracies are fractions in [0, 1], losses are in nats, times in seconds, sizes in bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from fedshelf.core.choices import Candidate
from fedshelf.core.class_folder import ProductCount


class ClientStatus(StrEnum):
    """How a member of the cohort ended a round."""

    COUNTED = "counted"
    LATE = "late"
    REFUSED = "refused"
    FAILED = "failed"
    OFFLINE = "offline"
    WITHDRAWN = "withdrawn"


class RunStatus(StrEnum):
    """The status of a run. `running` with a dead process is shown as stopped."""

    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, kw_only=True, slots=True)
class Participation:
    """One cohort member's part in a round.

    Attributes:
        client: the client's name.
        status: how it ended the round.
        reason: why the upload was not counted, or how a counted upload was modified; empty if it was not.
        num_examples: photos trained on.
        train_loss: mean training loss in nats.
        accuracy: accuracy of the model after the round on the client's own validation photos.
        seconds: duration of training.
        num_steps: local steps taken.
        batch_size: batch size of local training.
        client_lr: learning rate of local training.
        staleness: in asynchronous rounds, versions by which the model advanced since the client received it.
        number: in asynchronous rounds, index of this upload among the client's uploads in the round.
    """

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

    @property
    def weight(self) -> float:
        """The weight of what it reports: its photos, or 1 if their number is withheld."""
        return 1.0 if self.num_examples is None else float(self.num_examples)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStarted:
    """A run has started or resumed.

    Attributes:
        run_id: the run.
        num_rounds: rounds of the whole run.
        first_round: the next round; above 1 if the run was resumed.
        num_parameters: trainable values of the model.
        num_classes: classes in the catalogue.
        min_clients: clients needed to start; 0 if the run resumes, which needs no more than its quorum.
        num_test: test photos at the server; None if it has none.
        num_test_left_out: further test photos, of products that no client holds.
        catalogue_digest: digest of the products.
        config_digest: digest of the run's configuration.
        note: what the run costs besides training, for people; "" if there is nothing to say.
    """

    run_id: str
    num_rounds: int
    first_round: int
    num_parameters: int
    num_classes: int
    min_clients: int
    num_test: int | None = None
    num_test_left_out: int = 0
    catalogue_digest: str = ""
    config_digest: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsLoaded:
    """A new run starts from existing weights. Rows of a head are matched by class name.

    Attributes:
        file: the name of their file, or where pretrained ones come from.
        kept: classes whose row keeps its position.
        moved: classes whose row has another position now.
        added: classes missing from the file; their rows are newly initialized.
        dropped: classes that the run does not have.
        reason: why the whole head is newly initialized; empty if rows were reused.
    """

    file: str
    kept: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogueChanged:
    """The catalogue has new products, or new names for some, from the next round on.

    Attributes:
        round: the last round before.
        num_classes: number of products now.
        num_parameters: number of trainable values of the model now.
        catalogue_digest: digest of the catalogue.
        added: the new products.
    """

    round: int
    num_classes: int
    num_parameters: int
    catalogue_digest: str
    added: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientJoined:
    """A client is ready for work, for the first time or again.

    Attributes:
        client: the client's name.
        num_train: its training photos; None if it does not tell.
        num_validation: its validation photos; None if it does not tell.
        num_left_out: its photos of classes missing from the catalogue; None if it does not tell.
    """

    client: str
    num_train: int | None
    num_validation: int | None
    num_left_out: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientRefused:
    """A client was not admitted, or one of its messages was not accepted outside of its own round."""

    client: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientLeft:
    """A connection was lost, before or after setup. The client may return."""

    client: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """The server has been waiting for a while. Repeated at growing intervals.

    Attributes:
        what: what the server waits for, as a phrase: "3 clients to start".
        live: connected clients.
        missing: clients awaited by name; empty if any client will do.
        seconds: time waited so far.
        returning: clients that took part before the server's restart and have not returned yet.
        seconds_to_return: time that those still have; then the run continues without them.
    """

    what: str
    live: tuple[str, ...]
    missing: tuple[str, ...]
    seconds: float
    returning: tuple[str, ...] = ()
    seconds_to_return: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientExcluded:
    """A client is excluded from the run, because it failed again and again, or would.

    Attributes:
        client: the client's name.
        reason: why.
        last_round: the last round without it; None: until it joins again.
    """

    client: str
    reason: str
    last_round: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundStarted:
    """A round is about to dispatch work.

    Attributes:
        round: the round.
        attempt: the attempt at the round, from 0.
        cohort: the clients asked; in asynchronous rounds, those already at work.
    """

    round: int
    attempt: int
    cohort: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class UploadReceived:
    """A cohort member has replied, successfully or not.

    Attributes:
        round: the round.
        client: the client's name.
        status: how it ended the round.
        reason: why the upload is not counted.
        num_done: members that have replied so far.
        num_cohort: size of the cohort.
        num_bytes: size of the reply on the wire; 0 if there is none.
        digest: digest of the reply's vectors as they were received; "" if there are none.
        norm: norm of the trainable part of a valid upload, before any bound; None if the server does not see it.
    """

    round: int
    client: str
    status: ClientStatus
    reason: str
    num_done: int
    num_cohort: int
    num_bytes: int = 0
    digest: str = ""
    norm: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundVoid:
    """An attempt ended without a quorum. The round is retried."""

    round: int
    attempt: int
    reason: str
    clients: tuple[Participation, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductReport:
    """How the last round's model does on each product. Products are indices in the catalogue.

    Attributes:
        products: on the stores' validation photos, of each product that has any.
        levels: validation photos whose prediction lies in the correct folder, by level of the product tree, coarsest
            first.
        num_photos: validation photos counted. A store counts for at most as many as in `RoundFinished.accuracy`.
        num_stores: stores that reported.
        num_withheld: stores whose policy withholds these counts.
        confusion: test photos of each product and prediction, as (product, prediction, photos).
    """

    products: tuple[ProductCount, ...] = ()
    levels: tuple[int, ...] = ()
    num_photos: int = 0
    num_stores: int = 0
    num_withheld: int = 0
    confusion: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundFinished:
    """A new version of the model is complete.

    Attributes:
        round: the round.
        attempt: the attempt that succeeded, from 0.
        clients: the cohort members.
        train_loss: mean loss of the training that led to this version.
        accuracy: accuracy on the clients' validation photos.
        central_accuracy: accuracy on the server's test photos; None if not measured in this round.
        central_loss: loss on the server's test photos; None if not measured in this round.
        seconds: duration of the round.
        bytes_up: payload received from all clients.
        bytes_down: payload sent to all clients.
        best_round: the best round so far.
        virtual_seconds: duration in a simulation's virtual time, including void attempts.
        model_digest: digest of the new model.
        report: how it does on each product; only of the last round.
    """

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
    model_digest: str = ""
    report: ProductReport | None = None


NOT_TOLD = "it does not tell which of its models it keeps"
"""Why there is no comparison of a store that withholds it, or whose figures would have no noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreComparison:
    """How the candidate models do at one store (see `core.messages.Comparison`).

    Attributes:
        client: the store.
        best: the model that the store keeps; None if there is no comparison.
        accuracies: accuracy of each candidate.
        on_test: whether accuracies are measured on test photos.
        reason: why there is no comparison.
    """

    client: str
    best: Candidate | None
    accuracies: Mapping[Candidate, float]
    on_test: bool
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonStarted:
    """The rounds are over, and `stores` are asked which model serves them best.

    Each store trains a local model, so this takes as long as all rounds took.
    """

    round: int
    stores: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonReceived:
    """One store has replied to the comparison, successfully or not.

    Attributes:
        round: the last round.
        client: the store.
        reason: why there is no comparison; empty if there is one.
        num_done: stores that have replied so far.
        num_stores: stores asked.
    """

    round: int
    client: str
    reason: str
    num_done: int
    num_stores: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StoresCompared:
    """The comparison of models at all stores, after the last round."""

    round: int
    stores: tuple[StoreComparison, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseReported:
    """How much noise covers each release of a client, or each model of the server.

    Attributes:
        client: the client; "" for the server.
        noise_multiplier: standard deviation of the noise, as a multiple of the bound on a photo or client.
        sampling_rate: probability with which each photo or client takes part in a sum.
        steps: number of sums in a release.
        is_discrete: whether stores add the noise together, as integers that are worth a Gaussian's noise in Rényi
            divergences (`privacy.distributed_dp`).
    """

    client: str
    noise_multiplier: float
    sampling_rate: float
    steps: int
    is_discrete: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEnded:
    """The server is about to close. A `stopped` run can be resumed."""

    status: RunStatus
    reason: str = ""


Event: TypeAlias = (
    RunStarted
    | WeightsLoaded
    | CatalogueChanged
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
    | NoiseReported
    | RunEnded
)
