"""What the rounds of one run work with."""

from dataclasses import dataclass
from functools import cached_property

from fedshelf.algorithms.base import Algorithm
from fedshelf.core.ports import Clock
from fedshelf.rounds.dispatch import Asker
from fedshelf.rounds.download import Downloads
from fedshelf.rounds.examination import Examiner
from fedshelf.rounds.inbox import Reception
from fedshelf.rounds.membership import Membership
from fedshelf.rounds.plan import GlobalModel, Plan, Ports
from fedshelf.rounds.server_evaluation import CentralTest


@dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """The plan, the world, the model, and who is there."""

    plan: Plan
    ports: Ports
    algorithm: Algorithm
    model: GlobalModel
    membership: Membership
    reception: Reception
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
    def asker(self) -> Asker:
        """Hands work out, and waits for answers."""
        return Asker(
            transport=self.ports.transport, membership=self.membership, reception=self.reception,
            downloads=self.downloads, sink=self.ports.sink, timer=self.timer,
        )  # fmt: skip

    @cached_property
    def examiner(self) -> Examiner:
        """Knows what an upload must be."""
        return Examiner(
            uploads=self.plan.uploads, layout=self.model.layout, auxiliary=self.algorithm.auxiliary,
            max_examples=self.plan.rounds.max_examples,
        )  # fmt: skip

    @cached_property
    def test(self) -> CentralTest:
        """The server's own test of the model."""
        return CentralTest(
            evaluate=self.model.evaluate_centrally, every=self.plan.test_every, last=self.plan.num_rounds
        )  # fmt: skip
