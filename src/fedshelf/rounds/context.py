"""What the rounds of one run work with."""

from dataclasses import dataclass
from functools import cached_property

from fedshelf.algorithms.base import Algorithm
from fedshelf.core.ports import Clock
from fedshelf.rounds.dispatch import Dispatcher
from fedshelf.rounds.download import Downloads
from fedshelf.rounds.inbox import Inbox
from fedshelf.rounds.membership import Membership
from fedshelf.rounds.plan import GlobalModel, Plan, Ports
from fedshelf.rounds.server_evaluation import ServerEvaluation
from fedshelf.rounds.validation import UploadValidator


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

    @cached_property
    def test(self) -> ServerEvaluation:
        """The server's own test of the model."""
        return ServerEvaluation(
            evaluate=self.model.evaluate_centrally, every=self.plan.test_every, last=self.plan.num_rounds
        )  # fmt: skip
