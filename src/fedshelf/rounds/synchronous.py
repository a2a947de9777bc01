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
from fedshelf.core.messages import PARAMS, Broadcast, Evaluation, Purpose, TaskKey, Upload, auxiliary_vectors
from fedshelf.core.ports import Reply
from fedshelf.core.state import OpenRound, ServerState
from fedshelf.rounds.context import Context
from fedshelf.rounds.round_progress import RoundProgress
from fedshelf.rounds.validation import counted, problem_with_evaluation, source_of
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
        self._asker = context.dispatcher
        self._validator = context.validator
        self._test = context.test
        self._timer = context.timer

    def run(
        self, state: ServerState, opened: OpenRound, client_lr: float
    ) -> tuple[ServerState, RoundFinished | RoundVoid]:
        """One attempt at the round after `state`: the next state and its record, or the same round's state and why the
        attempt is void."""
        key, assignment = opened.key, self._plan.pacing.assign(opened)
        needed = cohorts.quorum(assignment.wanted, self._plan.rounds.quorum)
        started = self._ports.clock.now()
        self._ports.sink.emit(RoundStarted(round=key.round, attempt=key.attempt, cohort=opened.cohort))
        progress = RoundProgress(cohort=opened.cohort, assignment=assignment, needed=needed)
        self._train(progress, state, key, client_lr)
        pace = updated(state.pace, seen=progress.pace, at_least=progress.pace_bounds(self._timer.now()))
        state = replace(state, pace=pace)
        if len(progress.counted()) < needed:
            reason = f"{len(progress.counted())} of {assignment.wanted} clients were counted, the quorum is {needed}"
            return state, RoundVoid(
                round=key.round, attempt=key.attempt, reason=reason, clients=progress.participations()
            )
        next_state = self._aggregate(progress, state, key, population=len(opened.live))
        names = progress.counted()  # without those that the aggregator has left out
        self._evaluate(progress, next_state, key, names)
        central = self._test.score(next_state)
        members, evaluated = [progress.members[name] for name in names], sorted(progress.evaluated.items())
        return next_state, RoundFinished(
            round=key.round,
            attempt=key.attempt,
            clients=progress.participations(),
            train_loss=weighted((member.train_loss, float(member.num_examples or 0)) for member in members),
            accuracy=weighted((progress.members[name].accuracy, float(count)) for name, count in evaluated),
            central_accuracy=central.accuracy if central else None,
            central_loss=central.loss if central else None,
            seconds=self._ports.clock.now() - started,
            bytes_up=progress.bytes_up,
            bytes_down=progress.bytes_down,
            best_round=None,
        )

    def _train(self, progress: RoundProgress, state: ServerState, key: TaskKey, client_lr: float) -> None:
        """Ask the cohort to train and spool what comes back until all have answered or the deadline has passed."""
        for name in self._ports.spool.names(key):  # what a server that crashed in this round had already received
            upload = self._ports.spool.get(key, name)
            if name in progress.cohort and isinstance(upload, Upload):
                self._note(progress, key, counted(name, upload))

        added = auxiliary_vectors(self._algorithm.broadcast(state, self._layout.num_trainable))

        def broadcast(name: str) -> Broadcast:
            return Broadcast(
                key=key, purpose=Purpose.TRAIN, client_lr=client_lr, vectors={PARAMS: state.model, **added},
                counted=state.counted.get(name), num_steps=progress.assignment.steps_for(name),
            )  # fmt: skip

        def on_reply(reply: Reply) -> None:
            member = self._receive(reply, key, progress.assignment.share(reply.client))
            if member.status is ClientStatus.COUNTED:
                progress.record_pace(reply.client, self._timer.now())
            self._note(progress, key, member)

        began = self._timer.now()
        grace = self._plan.rounds.rejoin_grace if self._membership.returning() else 0.0  # in a round that is resumed
        progress.patient_until = began + progress.assignment.patience + grace
        self._asker.dispatch(
            progress.pending(), key, broadcast, on_reply, seconds=self._plan.rounds.timeout, traffic=progress,
            enough=progress.enough, wake=progress.patient_until,
        )  # fmt: skip
        ended = self._timer.now()
        for name in progress.pending():
            if self._membership.address(name) is None:
                reason = self._membership.absence(name)
                self._note(progress, key, Participation(client=name, status=ClientStatus.OFFLINE, reason=reason))
            else:
                reason = progress.late_reason(began, ended, self._plan.rounds.timeout)
                self._note(progress, key, Participation(client=name, status=ClientStatus.LATE, reason=reason))

    def _receive(self, reply: Reply, key: TaskKey, share: float) -> Participation:
        """Examine an answer to a training task; an upload that passes is spooled as what the configured work, of which
        `share` was done, would have led to."""
        found = self._validator.validate(reply, key)
        if isinstance(found, Participation):
            return found
        upload = normalized(found, share, num_trainable=self._layout.num_trainable)
        self._ports.spool.put(key, reply.client, upload, source_of(reply, upload))
        return counted(reply.client, upload)

    def _aggregate(self, progress: RoundProgress, state: ServerState, key: TaskKey, population: int) -> ServerState:
        """The state with the new model. Whom the aggregator leaves out of that is refused: what the round changed at
        such a client must not last, for the server knows nothing of it."""
        names = progress.counted()
        uploads = [upload for name in names if isinstance(upload := self._ports.spool.get(key, name), Upload)]
        alike = self._plan.rounds.equal_weights
        weights = [1.0 if alike else self._algorithm.weight(upload, staleness=0) for upload in uploads]
        aggregate, verdicts = combine(uploads, weights, self._plan.aggregator, num_trainable=self._layout.num_trainable)
        for name, verdict in zip(names, verdicts, strict=True):
            progress.members[name] = _judged(progress.members[name], verdict)
        by_name, names = dict(zip(names, weights, strict=True)), progress.counted()
        length = weighted((progress.assignment.share(name), by_name[name]) for name in names) or 1.0
        after = self._algorithm.server_update(state, stretched(aggregate, length), population)
        return self._downloads.advance(
            replace(
                after,
                round=key.round,
                params=self._layout.clamp(after.params),
                counted={**state.counted, **dict.fromkeys(names, key)},
            )
        )

    def _evaluate(self, progress: RoundProgress, state: ServerState, key: TaskKey, names: Sequence[str]) -> None:
        """Ask those counted how the new model does on their own validation photos."""
        # A server restarted in this phase has everybody's upload, and nobody with it yet.
        returning = self._membership.returning()
        asked = [name for name in names if self._membership.num_validation(name) or name in returning]

        def broadcast(name: str) -> Broadcast:
            return Broadcast(key=key, purpose=Purpose.EVALUATE, client_lr=0.0, vectors={PARAMS: state.model})

        def on_reply(reply: Reply) -> None:
            problem = problem_with_evaluation(reply, key, self._membership.num_validation(reply.client))
            if problem:
                self._ports.sink.emit(
                    ClientRefused(client=reply.client, reason=f"its evaluation is not used: {problem}")
                )
            elif isinstance(reply.message, Evaluation) and reply.message.num_examples:
                accuracy = reply.message.num_correct / reply.message.num_examples
                progress.members[reply.client] = replace(progress.members[reply.client], accuracy=accuracy)
                progress.evaluated[reply.client] = min(reply.message.num_examples, self._plan.rounds.max_examples)

        self._asker.dispatch(asked, key, broadcast, on_reply, seconds=self._plan.rounds.timeout, traffic=progress)

    def _note(self, progress: RoundProgress, key: TaskKey, member: Participation) -> None:
        progress.members[member.client] = member
        self._ports.sink.emit(
            UploadReceived(
                round=key.round, client=member.client, status=member.status, reason=member.reason,
                num_done=len(progress.members), num_cohort=len(progress.cohort),
            )
        )  # fmt: skip


def _judged(member: Participation, verdict: Verdict) -> Participation:
    status = ClientStatus.REFUSED if verdict.left_out else member.status
    return replace(member, status=status, reason=verdict.reason)
