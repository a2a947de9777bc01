"""Synchronous rounds one after the other: each is tried until it has its quorum."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from fedshelf.core.errors import RunError
from fedshelf.core.events import RoundFinished
from fedshelf.core.messages import TaskKey
from fedshelf.core.state import OpenRound, ServerState
from fedshelf.rounds.context import Context
from fedshelf.rounds.inbox import POLL_SECONDS
from fedshelf.rounds.plan import MAX_VOID_IN_A_ROW
from fedshelf.rounds.synchronous import SynchronousRound
from fedshelf.scheduling import cohort as cohorts
from fedshelf.scheduling.pace import predicted

log = logging.getLogger(__name__)


class SynchronousRounds:
    """Draws cohorts, and repeats what was void."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._plan = context.plan
        self._ports = context.ports
        self._membership = context.membership
        self._single = SynchronousRound(context)
        self._opened: OpenRound | None = None

    def resume(self, state: ServerState, opened: OpenRound | None) -> None:
        """Go on with the round that a server before this one had opened."""
        self._opened = opened
        self._membership.expect(opened.live if opened else (), self._plan.rounds.rejoin_grace)

    def next(self, state: ServerState) -> tuple[ServerState, RoundFinished, Sequence[str]]:
        """Do a round, and return the next state, its record, and who was there when its cohort was drawn.

        Raises:
            RunError: the round was void, however often it was tried.
        """
        opened, attempt, reason = self._opened, 0, ""
        for _ in range(MAX_VOID_IN_A_ROW):
            if opened is None or opened.key.round != state.round + 1 or opened.key.attempt < attempt:
                opened = self._open(state, attempt)
            state, outcome = self._single.run(state, opened, self._plan.client_lr(opened.key.round))
            if isinstance(outcome, RoundFinished):
                return state, outcome, opened.live
            self._ports.sink.emit(outcome)
            state = replace(state, void_rounds=state.void_rounds + 1)
            attempt, reason = outcome.attempt + 1, outcome.reason
        raise RunError(
            f"round {state.round + 1} was void {MAX_VOID_IN_A_ROW} times in a row, last because {reason}; give clients "
            "more time (--round-timeout), ask for fewer (--quorum), and start the server again"
        )

    def _open(self, state: ServerState, attempt: int) -> OpenRound:
        """Wait until enough clients are live, draw the cohort, and write it down before anybody is asked."""
        plan, number = self._plan, state.round + 1
        needed = plan.start_clients if number == 1 else plan.min_clients
        if self._membership.num_live() < needed:
            log.info("round %d waits until %d clients are live", number, needed)
        while self._membership.num_live() < needed or self._membership.returning() or not self._context.is_settled:
            self._context.inbox.poll(POLL_SECONDS)
        live = self._membership.live()
        count = cohorts.size(len(live), fraction=plan.fraction, min_clients=plan.min_clients)
        rng = plan.rng.fork(round=number, purpose=f"cohort-{attempt}")
        key = TaskKey(run_id=plan.run_id, round=number, attempt=attempt)
        num_train = {name: min(self._membership.num_train(name), plan.rounds.max_examples) for name in live}
        weights = cohorts.sampling_weights(
            plan.sampling, live, num_train=num_train, times_live=state.times_live, round=number
        )
        asked = cohorts.over_selected(count, len(live), plan.pacing.over_selection)
        cohort = cohorts.draw(live, asked, rng, weights)
        num_steps = plan.pacing.configured({name: num_train[name] for name in cohort})
        opened = OpenRound(
            key=key, cohort=cohort, live=live, wanted=count, num_steps=num_steps, pace=predicted(state.pace, num_steps)
        )
        self._ports.spool.clear()
        self._ports.checkpoints.save_open_round(opened)
        return opened
