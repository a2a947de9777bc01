"""Model selection at each store after the last round: the server's side (client: `personalization.model_selection`).

Each store trains a local model from the run's initial model for as many rounds as the run had (in asynchronous rounds,
for as many as a store had on average), so this takes as long as all rounds took. Stores only report accuracies and a
choice; the chosen model stays at the store.

Shapes: S shared values.
"""

from dataclasses import dataclass, field

from fedshelf.algorithms.base import Asynchronous
from fedshelf.core.errors import RefusedError
from fedshelf.core.events import NOT_TOLD, ComparisonReceived, ComparisonStarted, StoreComparison, StoresCompared
from fedshelf.core.messages import AUXILIARY, PARAMS, Broadcast, Comparison, Failure, Purpose, TaskKey
from fedshelf.core.ports import Reply
from fedshelf.core.state import ServerState
from fedshelf.personalization.model_selection import FIRST_MODEL
from fedshelf.rounds.dispatch import POLL_SECONDS, Patience, TrafficCounter
from fedshelf.rounds.plan import Context
from fedshelf.rounds.validation import check_comparison

COMPARISON_FACTOR = 5.0  # see `Patience`


@dataclass(eq=False)
class ModelComparison:
    """Asks all stores once.

    Attributes:
        context: the run's shared objects.
    """

    context: Context
    _found: dict[str, StoreComparison] = field(default_factory=dict, init=False)

    def run(self, state: ServerState) -> StoresCompared:
        """Compare the models at all stores that are live or were ever counted.

        Args:
            state: the state after the last round.

        Returns:
            The comparison of each store.

        Raises:
            StopRequested: the server was asked to stop; the next process asks again.
        """
        plan, membership, sink = self.context.plan, self.context.membership, self.context.ports.sink
        self._gather(state)
        key = TaskKey(run_id=plan.run_id, round=state.round, attempt=state.unused_attempt)
        stores = tuple(sorted({*membership.live(), *state.counted}))
        sink.emit(ComparisonStarted(round=state.round, stores=stores))

        def broadcast(name: str) -> Broadcast:
            return Broadcast(
                key=key, purpose=Purpose.COMPARE, client_lr=0.0,
                vectors={PARAMS: state.model.published, AUXILIARY + FIRST_MODEL: self.context.model.initial},
                counted=state.counted.get(name),
                num_rounds=self._num_rounds_alone(state.round, len(stores)),
            )  # fmt: skip

        def on_reply(reply: Reply) -> None:
            patience.on_reply()
            self._note(self._validated(reply, key), key, len(stores))

        timer, excluded = self.context.timer, membership.excluded()
        asked = [name for name in stores if name not in excluded]
        began = timer.now()
        patience = Patience(len(asked), factor=COMPARISON_FACTOR, at_least=plan.rounds.timeout, timer=timer)
        self.context.dispatcher.dispatch(
            asked, key, broadcast, on_reply, seconds=plan.rounds.timeout * state.round, traffic=TrafficCounter(),
            enough=patience.is_over,
        )  # fmt: skip
        for name in stores:
            if name not in self._found:
                there = membership.address(name) is not None and name not in excluded
                reason = f"no answer within {timer.now() - began:.4g} s" if there else membership.absence(name)
                self._note(_without(name, reason), key, len(stores))
        return StoresCompared(round=state.round, stores=tuple(self._found[name] for name in stores))

    def _num_rounds_alone(self, num_versions: int, num_stores: int) -> int | None:
        """The average number of tasks per store in asynchronous rounds; None (all rounds) in synchronous ones."""
        algorithm = self.context.algorithm
        if not isinstance(algorithm, Asynchronous):
            return None
        return max(1, round(num_versions * algorithm.buffer_size / num_stores))

    def _gather(self, state: ServerState) -> None:
        """After a restart, wait for the clients that are about to return."""
        membership = self.context.membership
        if self.context.ports.virtual is None and not membership.live() and not membership.returning():
            membership.expect(state.counted, self.context.plan.rounds.rejoin_grace)
        self.context.inbox.wait_for_returning()
        # In a simulation, all clients that were live return at once; the others would still be away.
        while not self.context.is_settled:
            self.context.inbox.poll(POLL_SECONDS)

    def _validated(self, reply: Reply, key: TaskKey) -> StoreComparison:
        message = reply.message
        if isinstance(message, Failure):
            if message.refused:
                self.context.membership.on_refused(reply.client, message.reason, doing=Purpose.COMPARE)
            return _without(reply.client, message.reason)
        if not isinstance(message, Comparison):
            return _without(reply.client, f"its answer is not used: {reply.reason or 'it is not a comparison'}")
        try:
            check_comparison(message, key=key, num_validation=self.context.membership.num_validation(reply.client))
        except RefusedError as error:
            return _without(reply.client, f"its answer is not used: {error}")
        if message.best is None and not message.accuracies:
            return _without(reply.client, NOT_TOLD)
        return StoreComparison(
            client=reply.client, best=message.best, accuracies=message.accuracies, on_test=message.on_test
        )  # fmt: skip

    def _note(self, found: StoreComparison, key: TaskKey, num_stores: int) -> None:
        self._found[found.client] = found
        self.context.ports.sink.emit(
            ComparisonReceived(
                round=key.round, client=found.client, reason=found.reason, num_done=len(self._found),
                num_stores=num_stores,
            )
        )  # fmt: skip


def _without(client: str, reason: str) -> StoreComparison:
    return StoreComparison(client=client, best=None, accuracies={}, on_test=False, reason=reason)
