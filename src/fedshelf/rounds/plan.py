"""What a run is to do, with which model, in which world, and what its rounds share."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from fedshelf.algorithms.base import Algorithm
from fedshelf.algorithms.reduce import MEAN, Aggregator
from fedshelf.compression.codec_policy import CodecPolicy
from fedshelf.compression.download import Downloads
from fedshelf.core.choices import SamplingName
from fedshelf.core.events import RoundFinished, WeightsLoaded
from fedshelf.core.messages import Setup
from fedshelf.core.params import Layout
from fedshelf.core.ports import Checkpoints, Clock, MetricSink, Spool, Transport, VirtualClock
from fedshelf.core.rng import Rng
from fedshelf.core.state import ServerState
from fedshelf.data.catalogue import Catalogue
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
    """When a round is over. `timeout` in seconds; `max_examples` caps what one client may claim as weight;
    `rejoin_grace` is how long members of a resumed round may take to come back; `equal_weights` lets all uploads count
    alike (clients were drawn in proportion to what would be their weight)."""

    timeout: float
    quorum: int | None
    max_examples: int
    rejoin_grace: float
    equal_weights: bool = False


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GlobalModel:
    """The model that a catalogue leads to: its layout, its first values [S], how it is tested and written out.

    `num_test` photos are of products in the catalogue, `num_test_left_out` are not. `loaded` says
    what of a file's weights is among the first values.
    """

    layout: Layout
    initial: Tensor
    evaluate_on_server: Callable[[Tensor], Score] | None
    publish: Callable[[Tensor, RoundFinished, bool], None]
    num_test: int | None = None
    num_test_left_out: int = 0
    loaded: WeightsLoaded | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Plan:
    """What a run is to do.

    It starts with `start_clients`. `client_lr` maps a round to its learning rate;
    `config` is what clients are sent; `uploads` and `downloads` say how vectors travel, `aggregator` how uploads become
    one, `pacing` what is made of machines that differ; `max_staleness` (versions; None: any) is for asynchronous
    rounds. `aliases` says which names of products mean
    the same one. The server tests the model every `test_every` rounds; where it `compares`, stores tell in the end
    which model serves them best.
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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ports:
    """The world, as this run sees it. Deadlines go by `virtual`, the clock of a simulation, where there is one; what
    took how long, by `clock`."""

    transport: Transport
    checkpoints: Checkpoints
    spool: Spool
    sink: MetricSink
    clock: Clock
    stop: threading.Event
    virtual: VirtualClock | None = None


def setup_of(plan: Plan, catalogue: Catalogue, layout: Layout) -> Setup:
    """What clients are told before their first round."""
    return Setup(run_id=plan.run_id, config=plan.config, catalogue=catalogue.to_json(), layout_digest=layout.digest)


@dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """The plan, the world, the model, and who is there."""

    plan: Plan
    ports: Ports
    algorithm: Algorithm
    model: GlobalModel
    membership: Membership
    inbox: Inbox
    downloads: Downloads

    @property
    def timer(self) -> Clock:
        """What deadlines go by: the clock of a simulation, where there is one."""
        return self.ports.virtual or self.ports.clock

    @property
    def is_settled(self) -> bool:
        """Whether, in a simulation, nobody comes or goes at this very moment: who is there is asked after that."""
        return self.ports.virtual is None or self.ports.virtual.is_settled()

    @cached_property
    def dispatcher(self) -> Dispatcher:
        """Hands work out, and waits for answers."""
        return Dispatcher(
            transport=self.ports.transport, membership=self.membership, inbox=self.inbox,
            downloads=self.downloads, sink=self.ports.sink, timer=self.timer,
        )  # fmt: skip

    @cached_property
    def validator(self) -> UploadValidator:
        """Knows what an upload must be."""
        return UploadValidator(
            uploads=self.plan.uploads, layout=self.model.layout, auxiliary=self.algorithm.auxiliary,
            max_examples=self.plan.rounds.max_examples,
        )  # fmt: skip

    def evaluate(self, state: ServerState) -> Score | None:
        """Score the model of `state` on the server's own test photos; None where it is not tested."""
        due = state.round % self.plan.test_every == 0 or state.round == self.plan.num_rounds
        return self.model.evaluate_on_server(state.model) if due and self.model.evaluate_on_server else None
