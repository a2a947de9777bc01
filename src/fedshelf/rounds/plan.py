"""The plan of a run, its model and ports, and the objects that its rounds share."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from fedshelf.algorithms.base import Algorithm
from fedshelf.algorithms.reduce import MEAN, Aggregator
from fedshelf.compression.codec_policy import CodecPolicy
from fedshelf.compression.download import Downloads, name_of
from fedshelf.core.choices import SamplingName
from fedshelf.core.events import RoundFinished, WeightsLoaded
from fedshelf.core.messages import FROZEN, TEACHER, Setup
from fedshelf.core.params import Layout
from fedshelf.core.ports import Checkpoints, Clock, IdentityKey, MetricSink, Spool, Transport, VirtualClock
from fedshelf.core.rng import Rng
from fedshelf.core.state import Best, ModelState, ServerState
from fedshelf.data.catalogue import Catalogue
from fedshelf.privacy.base import DEFAULT_DELTA
from fedshelf.privacy.client_dp import NoisyMean
from fedshelf.privacy.homomorphic.settings import NOT_ENCRYPTED, Encryption
from fedshelf.privacy.homomorphic.upload_form import EncryptedForm
from fedshelf.rounds.dispatch import Dispatcher, Inbox
from fedshelf.rounds.membership import Membership
from fedshelf.rounds.pipeline import UploadPipeline
from fedshelf.rounds.validation import UploadValidator
from fedshelf.scheduling.early_stopping import EarlyStopping
from fedshelf.scheduling.work_assignment import UNPACED, Pacing
from fedshelf.training.trainer import Score

MAX_VOID_IN_A_ROW = 10  # attempts at a round, before the run fails


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundSettings:
    """When a round is over, and how uploads are weighted.

    Attributes:
        timeout: time limit in seconds.
        quorum: uploads that a round needs at least.
        max_examples: upper bound on the weight that one client may claim.
        rejoin_grace: seconds that members of a resumed round have to return.
        equal_weights: whether all uploads have equal weight: as configured, or because clients were sampled in
            proportion to their weight.
    """

    timeout: float
    quorum: int | None
    max_examples: int
    rejoin_grace: float
    equal_weights: bool = False


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GlobalModel:
    """The model for a catalogue.

    Attributes:
        layout: its layout.
        initial: its initial values [S].
        evaluate_on_server: scores a model [S] on the server's test photos; None if there are none.
        publish: writes out a model [S], with its round's record and whether it is the best.
        num_test: test photos of products in the catalogue.
        num_test_left_out: test photos of other products.
        loaded: which of a file's weights are used in the initial values.
        frozen: [F]: the values that never change; None if all do.
        head: name of the output layer; "" if it is not a single linear one.
        rows: names of the tensors with one row of values per class.
        note: what the run costs besides training, for people; "" if there is nothing to say.
        fuse: makes one model [S] of those of a round's clients, each [S], and their average, with a generator of the
            round; None: the average is the model.
    """

    layout: Layout
    initial: Tensor
    evaluate_on_server: Callable[[Tensor], Score] | None
    publish: Callable[[Tensor, RoundFinished, bool], None]
    num_test: int | None = None
    num_test_left_out: int = 0
    loaded: WeightsLoaded | None = None
    frozen: Tensor | None = None
    head: str = ""
    rows: frozenset[str] = frozenset()
    note: str = ""
    fuse: Callable[[Iterable[Tensor], Tensor, Rng], Tensor] | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SentTeacher:
    """A model that stores learn from.

    Attributes:
        description: what it is (JSON text).
        values: its values [V].
    """

    description: str
    values: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Plan:
    """The configuration of a run.

    Attributes:
        run_id: the run.
        num_rounds: number of rounds.
        start_clients: clients needed to start.
        fraction: fraction of the live clients in a cohort.
        rng: the run's random generator.
        client_lr: learning rate of a round.
        rounds: when a round is over.
        early_stopping: when the run ends early, and which round is best.
        config: the configuration that clients receive (TOML text).
        config_digest: its digest.
        catalogue: the catalogue; None: built from the clients' classes.
        uploads: stages that uploads pass.
        downloads: how downloads are encoded.
        sampling: how cohorts are sampled.
        aggregator: how uploads are aggregated.
        max_staleness: in asynchronous rounds, staleness limit in versions; None: no limit.
        test_every: rounds between tests on the server.
        pacing: how work is adapted to the clients' speed.
        aliases: product names that mean the same product.
        compares: whether stores compare models after the last round.
        confirmed: whether an unusual catalogue of the clients' classes is accepted.
        closed_form: computes the output layer in closed form, before or after the rounds.
        warm_start: whether that is done in a round 0.
        refit_head: whether it is done after the last round.
        average_rounds: number of last rounds whose models are averaged; 1 for none.
        noisy_mean: adds noise to the sum of the uploads, each of which it bounds; None: no noise.
        delta: the probability with which a guarantee of noise may fail.
        threshold: with masked uploads, members whose shares open the sum; None: more than two thirds.
        evaluates: whether stores tell how models do on their photos, each for itself or in a sum.
        encryption: whether uploads are encrypted, and who decrypts.
        teacher: what stores learn from besides their labels; None: nothing.
    """

    run_id: str
    num_rounds: int
    start_clients: int
    fraction: float
    rng: Rng
    client_lr: Callable[[int], float]
    rounds: RoundSettings
    early_stopping: EarlyStopping
    config: str
    config_digest: str
    catalogue: Catalogue | None
    uploads: UploadPipeline = field(default_factory=UploadPipeline)
    downloads: CodecPolicy = field(default_factory=CodecPolicy)
    sampling: SamplingName = "uniform"
    aggregator: Aggregator = MEAN
    max_staleness: int | None = None
    test_every: int = 1
    pacing: Pacing = UNPACED
    aliases: Mapping[str, str] = field(default_factory=dict)
    compares: bool = False
    confirmed: bool = False
    closed_form: Algorithm | None = None
    warm_start: bool = False
    refit_head: bool = False
    average_rounds: int = 1
    noisy_mean: NoisyMean | None = None
    delta: float = DEFAULT_DELTA
    threshold: int | None = None
    evaluates: bool = True
    encryption: Encryption = NOT_ENCRYPTED
    teacher: SentTeacher | None = None

    def after(self, refits: Sequence[int]) -> "Plan":
        """The plan of a run in which some rounds were not trained in, but computed the output layer anew."""
        number, client_lr = len(refits), self.client_lr
        return replace(
            self, num_rounds=self.num_rounds + number, client_lr=lambda round_: client_lr(max(1, round_ - number))
        )  # fmt: skip

    def needs_counts(self, algorithm: Algorithm) -> str:
        """Which setting needs the clients' numbers of photos, with its remedy; empty if none does."""
        if algorithm.counts_photos:
            return "--algorithm ridge"
        if algorithm.weighs_examples and not self.rounds.equal_weights:
            return "--weights examples; use --weights equal"
        if self.sampling == "size":
            return "--sampling size; use --sampling uniform"
        return "--local-work or --straggler-factor; leave them out" if self.pacing.watches else ""

    @property
    def first_round(self) -> int:
        """The number of the run's first round."""
        return 0 if self.warm_start else 1

    def is_last(self, round: int, best: Best | None) -> bool:
        """Whether the run ends with `round`, if `best` is the best round then."""
        return round >= self.num_rounds or self.early_stopping.exhausted(round, best)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ports:
    """The outside world of this run.

    Attributes:
        transport: carries messages.
        checkpoints: stores the server's state.
        spool: stores uploads.
        sink: receives events.
        clock: measures durations.
        stop: set to request a stop.
        virtual: a simulation's clock, used for deadlines; None outside of simulations.
        identities: returns the clients' identity keys by name; None if clients have none.
    """

    transport: Transport
    checkpoints: Checkpoints
    spool: Spool
    sink: MetricSink
    clock: Clock
    stop: threading.Event
    virtual: VirtualClock | None = None
    identities: Callable[[], Mapping[str, IdentityKey] | None] = lambda: None


def setup_of(plan: Plan, catalogue: Catalogue, layout: Layout, frozen: Tensor | None) -> Setup:
    """The setup that clients receive before their first round.

    Args:
        plan: the configuration.
        catalogue: the classes.
        layout: the model's layout.
        frozen: [F]: the values that never change; None if all do.
    """
    teacher = plan.teacher
    vectors = {FROZEN: frozen, TEACHER: None if teacher is None else teacher.values}
    return Setup(
        run_id=plan.run_id, config=plan.config, catalogue=catalogue.to_json(), layout_digest=layout.digest,
        frozen="" if frozen is None else name_of(frozen), teacher="" if teacher is None else teacher.description,
        vectors={name: vector for name, vector in vectors.items() if vector is not None},
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """The objects that all rounds of a run share.

    Attributes:
        plan: the configuration.
        ports: the outside world.
        algorithm: the federated algorithm.
        model: the global model.
        catalogue: the classes.
        membership: the clients.
        inbox: receives messages.
        downloads: encodes the model for each client.
        closed_form: whether clients are asked for `plan.closed_form`, which then is the `algorithm`.
        closes: whether the run ends with the current round in any case.
    """

    plan: Plan
    ports: Ports
    algorithm: Algorithm
    model: GlobalModel
    catalogue: Catalogue
    membership: Membership
    inbox: Inbox
    downloads: Downloads
    closed_form: bool = False
    closes: bool = False
    _tested: list[tuple[ModelState, Score]] = field(default_factory=list, init=False)  # the newest

    def is_last(self, round: int, best: Best | None) -> bool:
        """Whether the run ends with `round`, if `best` is the best round then."""
        return self.closes or (not self.plan.refit_head and self.plan.is_last(round, best))

    @property
    def timer(self) -> Clock:
        """The clock for deadlines: a simulation's virtual clock, otherwise the real one."""
        return self.ports.virtual or self.ports.clock

    @property
    def is_settled(self) -> bool:
        """Whether, in a simulation, all joins and departures at the current time are done.

        Cohorts are drawn after that.
        """
        return self.ports.virtual is None or self.ports.virtual.is_settled()

    @property
    def aggregator(self) -> Aggregator:
        """How uploads are aggregated: exact sums always by adding them."""
        return MEAN if self.algorithm.sums else self.plan.aggregator

    @cached_property
    def uploads(self) -> UploadPipeline:
        """The stages that uploads of the algorithm pass."""
        return self.plan.uploads.of(self.algorithm, self.model.layout)

    @cached_property
    def encrypted_form(self) -> EncryptedForm | None:
        """The form of encrypted uploads; None if they are not encrypted."""
        summand = self.uploads.summand
        if summand is None or not self.uploads.is_encrypted:
            return None
        return EncryptedForm.of(self.plan.encryption, summand, self.model.layout, self.model.head)

    @cached_property
    def dispatcher(self) -> Dispatcher:
        """Dispatches tasks and waits for replies."""
        return Dispatcher(
            transport=self.ports.transport, membership=self.membership, inbox=self.inbox,
            downloads=self.downloads, sink=self.ports.sink, timer=self.timer,
        )  # fmt: skip

    @cached_property
    def validator(self) -> UploadValidator:
        """Validates uploads."""
        return UploadValidator(
            uploads=self.uploads, layout=self.model.layout,
            vectors=self.algorithm.vectors(self.model.layout),
            max_examples=self.plan.rounds.max_examples, sums=self.algorithm.sums, encrypted=self.encrypted_form,
        )  # fmt: skip

    def evaluate(self, state: ServerState, *, is_last: bool = False) -> Score | None:
        """Score the model of `state` on the server's test photos; None if it is not tested in this round."""
        due = is_last or self.closes or state.round % self.plan.test_every == 0 or state.round == self.plan.num_rounds
        if not due or self.model.evaluate_on_server is None:
            return None
        if not self._tested or self._tested[0][0] is not state.model:
            self._tested[:] = [(state.model, self.model.evaluate_on_server(state.model.published))]
        return self._tested[0][1]
