"""The server's side of a synchronous round, top to bottom: draw, broadcast, collect, fold, evaluate, record."""

from collections.abc import Sequence
from dataclasses import replace

from fedshelf.algorithms.aggregation import combine, normalized, stretched, weighted
from fedshelf.algorithms.reduce import Verdict
from fedshelf.core.events import (
    ClientRefused,
    ClientStatus,
    Participation,
    RoundFinished,
    RoundStarted,
    RoundVoid,
    UploadReceived,
)
from fedshelf.core.messages import Broadcast, Evaluation, Purpose, TaskKey, Upload
from fedshelf.core.state import OpenRound, ServerState
from fedshelf.rounds.context import Context
from fedshelf.rounds.examination import counted, problem_with_evaluation
from fedshelf.rounds.inbox import Answer
from fedshelf.rounds.round_progress import Tally
from fedshelf.scheduling import cohort as cohorts
from fedshelf.scheduling.pace import updated


class SynchronousRound:
    """Runs single attempts at rounds."""

    def __init__(self, context: Context) -> None:
        self._plan = context.plan
        self._ports = context.ports
        self._algorithm = context.algorithm
        self._layout = context.model.layout
        self._membership = context.membership
        self._downloads = context.downloads
        self._asker = context.asker
        self._examiner = context.examiner
        self._test = context.test
        self._timer = context.timer

    def run(
        self, state: ServerState, opened: OpenRound, client_lr: float
    ) -> tuple[ServerState, RoundFinished | RoundVoid]:
        """One attempt at the round after `state`: the next state and its record, or the same round's state and why the
        attempt is void."""
        key, orders = opened.key, self._plan.pacing.orders(opened)
        needed = cohorts.quorum(orders.wanted, self._plan.rounds.quorum)
        started = self._ports.clock.now()
        self._ports.sink.emit(RoundStarted(round=key.round, attempt=key.attempt, cohort=opened.cohort))
        tally = Tally(cohort=opened.cohort, orders=orders, needed=needed)
        self._train(tally, state, key, client_lr)
        pace = updated(state.pace, seen=tally.pace, at_least=tally.no_faster(self._timer.now()))
        state = replace(state, pace=pace)
        if len(tally.counted()) < needed:
            reason = f"{len(tally.counted())} of {orders.wanted} clients were counted, the quorum is {needed}"
            return state, RoundVoid(round=key.round, attempt=key.attempt, reason=reason, clients=tally.in_order())
        next_state = self._aggregate(tally, state, key, population=len(opened.live))
        names = tally.counted()  # without those that the aggregator has left out
        self._evaluate(tally, next_state, key, names)
        central = self._test.score(next_state)
        members, evaluated = [tally.members[name] for name in names], sorted(tally.evaluated.items())
        return next_state, RoundFinished(
            round=key.round,
            attempt=key.attempt,
            clients=tally.in_order(),
            train_loss=weighted((member.train_loss, float(member.num_examples or 0)) for member in members),
            accuracy=weighted((tally.members[name].accuracy, float(count)) for name, count in evaluated),
            central_accuracy=central.accuracy if central else None,
            central_loss=central.loss if central else None,
            seconds=self._ports.clock.now() - started,
            bytes_up=tally.bytes_up,
            bytes_down=tally.bytes_down,
            best_round=None,
        )

    def _train(self, tally: Tally, state: ServerState, key: TaskKey, client_lr: float) -> None:
        """Ask the cohort to train and spool what comes back until all have answered or the deadline has passed."""
        for name in self._ports.spool.names(key):  # what a server that crashed in this round had already received
            upload = self._ports.spool.get(key, name)
            if name in tally.cohort and isinstance(upload, Upload):
                self._note(tally, key, counted(name, upload))

        beside = self._algorithm.broadcast(state, self._layout.num_trainable)

        def broadcast(name: str) -> Broadcast:
            return Broadcast(
                key=key, purpose=Purpose.TRAIN, params=state.model, client_lr=client_lr, auxiliary=beside,
                counted=state.counted.get(name), num_steps=tally.orders.asked(name),
            )  # fmt: skip

        def settle(answer: Answer) -> None:
            member = self._receive(answer, key, tally.orders.share(answer.client))
            if member.status is ClientStatus.COUNTED:
                tally.saw(answer.client, self._timer.now())
            self._note(tally, key, member)

        began = self._timer.now()
        grace = self._plan.rounds.rejoin_grace if self._membership.returning() else 0.0  # in a round that is resumed
        tally.patient_until = began + tally.orders.patience + grace
        self._asker.ask(
            tally.pending(), key, broadcast, settle, seconds=self._plan.rounds.timeout, ledger=tally,
            enough=tally.enough, wake=tally.patient_until,
        )  # fmt: skip
        ended = self._timer.now()
        for name in tally.pending():
            if self._membership.address(name) is None:
                reason = self._membership.absence(name)
                self._note(tally, key, Participation(client=name, status=ClientStatus.OFFLINE, reason=reason))
            else:
                reason = tally.late(began, ended, self._plan.rounds.timeout)
                self._note(tally, key, Participation(client=name, status=ClientStatus.LATE, reason=reason))

    def _receive(self, answer: Answer, key: TaskKey, share: float) -> Participation:
        """Examine an answer to a training task; an upload that passes is spooled as what the configured work, of which
        `share` was done, would have led to."""
        found = self._examiner.examine(answer, key)
        if isinstance(found, Participation):
            return found
        upload = normalized(found.upload, share, num_trainable=self._layout.num_trainable)
        self._ports.spool.put(key, answer.client, upload, found.source if upload is found.upload else None)
        return counted(answer.client, upload)

    def _aggregate(self, tally: Tally, state: ServerState, key: TaskKey, population: int) -> ServerState:
        """The state with the new model. Whom the aggregator leaves out of that is refused: what the round changed at
        such a client must not last, for the server knows nothing of it."""
        names = tally.counted()
        uploads = [upload for name in names if isinstance(upload := self._ports.spool.get(key, name), Upload)]
        alike = self._plan.rounds.equal_weights
        weights = [1.0 if alike else self._algorithm.weight(upload, staleness=0) for upload in uploads]
        aggregate, verdicts = combine(uploads, weights, self._plan.aggregator, num_trainable=self._layout.num_trainable)
        for name, verdict in zip(names, verdicts, strict=True):
            tally.members[name] = _judged(tally.members[name], verdict)
        by_name, names = dict(zip(names, weights, strict=True)), tally.counted()
        length = weighted((tally.orders.share(name), by_name[name]) for name in names) or 1.0
        after = self._algorithm.server_update(state, stretched(aggregate, length), population)
        return self._downloads.advance(
            replace(
                after,
                round=key.round,
                params=self._layout.clamp(after.params),
                counted={**state.counted, **dict.fromkeys(names, key)},
            )
        )

    def _evaluate(self, tally: Tally, state: ServerState, key: TaskKey, names: Sequence[str]) -> None:
        """Ask those counted how the new model does on their own validation photos."""
        # A server restarted in this phase has everybody's upload, and nobody with it yet.
        returning = self._membership.returning()
        asked = [name for name in names if self._membership.num_validation(name) or name in returning]

        def broadcast(name: str) -> Broadcast:
            return Broadcast(key=key, purpose=Purpose.EVALUATE, params=state.model, client_lr=0.0)

        def settle(answer: Answer) -> None:
            problem = problem_with_evaluation(answer, key, self._membership.num_validation(answer.client))
            if problem:
                self._ports.sink.emit(
                    ClientRefused(client=answer.client, reason=f"its evaluation is not used: {problem}")
                )
            elif isinstance(answer.message, Evaluation) and answer.message.num_examples:
                accuracy = answer.message.num_correct / answer.message.num_examples
                tally.members[answer.client] = replace(tally.members[answer.client], accuracy=accuracy)
                tally.evaluated[answer.client] = min(answer.message.num_examples, self._plan.rounds.max_examples)

        self._asker.ask(asked, key, broadcast, settle, seconds=self._plan.rounds.timeout, ledger=tally)

    def _note(self, tally: Tally, key: TaskKey, member: Participation) -> None:
        tally.members[member.client] = member
        self._ports.sink.emit(
            UploadReceived(
                round=key.round, client=member.client, status=member.status, reason=member.reason,
                num_done=len(tally.members), num_cohort=len(tally.cohort),
            )
        )  # fmt: skip


def _judged(member: Participation, verdict: Verdict) -> Participation:
    status = ClientStatus.REFUSED if verdict.left_out else member.status
    return replace(member, status=status, reason=verdict.reason)
