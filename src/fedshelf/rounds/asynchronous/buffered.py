"""Asynchronous rounds on the server: keep clients busy, buffer their uploads, make a version.

A round is one server update, made as soon as the buffer is full. Clients still at work continue, and their uploads are
stale by the versions made in the meantime. No client waits for another.

A client first evaluates the model that it is about to train. A round's accuracy is the mean over the newest evaluations
of all live clients: measured without waiting, and one task older than the round's own model.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedshelf.algorithms.aggregation import capped, weighted
from fedshelf.algorithms.base import Asynchronous
from fedshelf.core.errors import RefusedError, RunError
from fedshelf.core.events import (
    ClientRefused,
    ClientStatus,
    Participation,
    RoundFinished,
    RoundStarted,
    RoundVoid,
    UploadReceived,
)
from fedshelf.core.messages import Evaluation, Failure, Purpose, TaskKey
from fedshelf.core.ports import Reply
from fedshelf.core.state import ModelState, OpenRound, ServerState
from fedshelf.rounds.asynchronous.buffer import UploadBuffer
from fedshelf.rounds.asynchronous.encrypted_sums import BufferedSums
from fedshelf.rounds.asynchronous.in_flight import DispatchedTask, TasksInFlight
from fedshelf.rounds.averaging import with_mean
from fedshelf.rounds.dispatch import POLL_SECONDS, Arrived, ClientReady
from fedshelf.rounds.divergence import problem_with_step
from fedshelf.rounds.plan import MAX_VOID_IN_A_ROW, Context
from fedshelf.rounds.reported_noise import ReportedNoise
from fedshelf.rounds.validation import problem_with_evaluation, source_of
from fedshelf.scheduling import cohort as cohorts


@dataclass(kw_only=True, eq=False)
class _RoundRecord:
    """Bookkeeping of one round.

    Attributes:
        number: the round.
        started: when it started, in seconds of the clock.
        bytes_up: payload received.
        num_drawn: number of cohorts drawn.
        num_void: number of void attempts.
        others: clients that were not counted.
        waiting: clients that failed and wait for the next version.
    """

    number: int
    started: float
    bytes_up: int = 0
    num_drawn: int = 0
    num_void: int = 0
    others: dict[str, Participation] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)

    def in_order(self) -> tuple[Participation, ...]:
        """The clients that were not counted, sorted by name."""
        return tuple(self.others[name] for name in sorted(self.others))


class BufferedRounds:
    """Makes one version after another. Tasks outlive the round that they started in."""

    def __init__(self, context: Context, algorithm: Asynchronous) -> None:
        self._context = context
        self._plan = context.plan
        self._ports = context.ports
        self._membership = context.membership
        self._size, self._relative = algorithm.buffer_size, algorithm.relative_to_present
        self._buffer = UploadBuffer(spool=context.ports.spool, layout=context.model.layout, run_id=context.plan.run_id)
        self._noise = ReportedNoise(
            context.ports.sink, delta=context.plan.delta, num_rounds=context.plan.num_rounds
        )  # fmt: skip
        self._tasks = TasksInFlight(context=context, model_at=self._model_at)
        summand = context.uploads.summand
        self._sums = None if summand is None else BufferedSums(context, summand, self._tasks, self._receive_later)
        self._later: deque[Arrived] = deque()  # what has arrived while the server waited for something else
        self._train_loss: float | None = None  # of the newest version, if its uploads were summed

    def resume(self, state: ServerState, opened: OpenRound | None) -> None:
        """Resume after a restart: tasks in flight are sent again as clients return."""
        self._membership.expect(opened.live if opened else (), self._plan.rounds.rejoin_grace)
        self._tasks.resume(state)
        if self._sums is not None:
            self._sums.resume(opened)

    def evaluations(self) -> Mapping[str, Evaluation | None]:
        """See `Rounds`. Clients have only evaluated earlier versions."""
        return {}

    def held_out(self) -> Tensor | None:
        """See `Rounds`. No version has seen validation photos."""
        return None

    def summed(self) -> None:
        """See `Rounds`. Asynchronous uploads are decoded one by one."""

    def next(self, state: ServerState) -> tuple[ServerState, RoundFinished, Sequence[str]]:
        """Fill the buffer and make the next version.

        Returns:
            The next state, its record, and the live clients.

        Raises:
            RunError: all attempts at the version failed.
        """
        live = self._membership.live
        record = _RoundRecord(number=state.round + 1, started=self._ports.clock.now())
        self._tasks.bytes_down = 0
        self._membership.begin_round(record.number)
        self._buffer.open(record.number, lambda version: self._model_at(version, state))
        self._tasks.forget_lost(self._buffer.newest())
        if len(self._buffer) >= self._size:
            state = self._catch_up(state, record)
        key = TaskKey(run_id=self._plan.run_id, round=record.number, attempt=0)
        self._dispatch_to_idle(state, record)
        notice = self._context.inbox.notice()
        while not self._tasks and len(self._buffer) < self._size:  # until there are enough clients
            notice.check(f"clients for round {record.number}", live=live(), missing=self._membership.missing())
            state = self._receive(state, record)
            self._dispatch_to_idle(state, record)
        opened = OpenRound(key=key, cohort=(), live=live(), encryption=self._sums.record if self._sums else "")
        self._ports.checkpoints.save_open_round(opened)
        self._ports.sink.emit(RoundStarted(round=record.number, attempt=0, cohort=self._tasks.names()))
        while True:
            while len(self._buffer) < self._size or self._drop_unreadable(record):
                state = self._receive(state, record)
                self._dispatch_to_idle(state, record)
                if self._have_all_failed(record):
                    self._dispatch_to_idle(state, record)
            try:
                model = self._next_model(state, record, opened)
            except RefusedError as error:  # of a sum: the uploads are of no use any more
                self._buffer.drop_all()
                self._declare_void(record, str(error))
                self._dispatch_to_idle(state, record)
                continue
            problem = problem_with_step(
                state.model.params, model, num_trainable=self._context.model.layout.num_trainable
            )  # fmt: skip
            if not problem:
                return *self._make_version(state, model, record), self._membership.live()
            if self._sums is not None:
                raise RunError(
                    f"the model is destroyed: {problem}. Of a sum, no single upload can be left out: start a new run "
                    "with lower learning rates (--client-lr, --server-lr)"
                )
            self._roll_back(record, f"the model is destroyed: {problem}")
            self._dispatch_to_idle(state, record)

    def _catch_up(self, state: ServerState, record: _RoundRecord) -> ServerState:
        """Recover a round whose uploads a previous server process had all received.

        No client may be connected, and their evaluations may be lost: wait for the clients that were live, and ask
        those without an evaluation.
        """
        notice, returning = self._context.inbox.notice(), self._membership.returning
        while returning():
            notice.check("stores to return", live=self._membership.live(), missing=returning())
            state = self._receive(state, record)
        for name in self._membership.live():
            if name not in state.evaluated and self._evaluates(name):
                self._tasks.send_evaluation(name, state)
        while self._tasks.any_evaluates():
            state = self._receive(state, record)
            self._dispatch_to_idle(state, record)
        return state

    def _dispatch_to_idle(self, state: ServerState, record: _RoundRecord) -> None:
        """Drop clients that are gone or overdue, and dispatch work up to the intended number of clients."""
        evaluating = self._tasks.evaluating()
        for name, gone in self._tasks.drop_overdue().items():
            status = ClientStatus.OFFLINE if gone else ClientStatus.LATE
            self._leave_out(record, name, status, self._absence_reason(name, gone))
            if name in evaluating and not gone:
                self._membership.on_failed(name, self._absence_reason(name, gone), doing=Purpose.EVALUATE)
        plan, live = self._plan, self._membership.live()
        needed = plan.start_clients if state.round == 0 else 1
        if len(self._buffer) >= self._size or len(live) < needed:
            return
        if self._sums is not None:
            try:
                live = tuple(self._sums.with_keys(live, TaskKey(run_id=plan.run_id, round=record.number, attempt=0)))
            except RefusedError as error:
                self._declare_void(record, str(error))
                return
        for name in live:
            self._tasks.resend_lost(name, state, self._counted(name, state))
        if self._membership.returning() or not self._context.is_settled:
            return  # otherwise a restarted server favors clients that reconnect quickly
        idle = [name for name in live if name not in self._tasks and name not in record.waiting]
        if self._sums is not None:  # a store has one upload in a sum
            idle = [name for name in idle if name not in self._buffer.newest()]
        wanted = cohorts.size(len(live), fraction=plan.fraction)
        for name in self._draw(idle, min(len(idle), wanted - len(self._tasks)), state, record):
            if self._evaluates(name):
                self._tasks.send_evaluation(name, state)
            else:
                self._send_training(name, state)

    def _draw(self, idle: Sequence[str], count: int, state: ServerState, record: _RoundRecord) -> Iterable[str]:
        if count <= 0:
            return ()
        most = self._plan.rounds.max_examples
        claims = capped([min(self._membership.num_train(name), most) for name in idle])
        weights = cohorts.sampling_weights(
            self._plan.sampling, idle, times_live=state.times_live, round=record.number,
            num_train=dict(zip(idle, claims, strict=True)),
        )  # fmt: skip
        record.num_drawn += 1
        return cohorts.draw(
            idle, count, self._plan.rng.fork(round=record.number, purpose=f"cohort-{record.num_drawn}"), weights
        )

    def _send_training(self, name: str, state: ServerState) -> None:
        number = state.round + 1
        attempt = self._buffer.num_answered(name, number)  # a second task on the same model gets its own key
        key = TaskKey(run_id=self._plan.run_id, round=number, attempt=attempt)
        self._tasks.send_training(name, key, state, self._counted(name, state))

    def _counted(self, name: str, state: ServerState) -> TaskKey | None:
        """The client's newest counted upload; an upload counts once it is in the buffer."""
        return self._buffer.newest().get(name, state.counted.get(name))

    def _evaluates(self, name: str) -> bool:
        return self._plan.evaluates and self._membership.num_validation(name) > 0

    def _receive(self, state: ServerState, record: _RoundRecord) -> ServerState:
        """Handle the next arrival; return the state with any new evaluation."""
        self._membership.check_enough_left()
        arrived = self._later.popleft() if self._later else self._context.inbox.poll(POLL_SECONDS)
        match arrived:
            case ClientReady(client=name):
                if self._sums is not None:
                    with suppress(RefusedError):  # then it answers that it has no keys
                        self._sums.with_keys([name], TaskKey(run_id=self._plan.run_id, round=record.number, attempt=0))
                self._tasks.resend(name)
            case Reply(client=name) as reply:
                dispatched = self._tasks.complete(reply)
                if dispatched is None:
                    refused = ClientRefused(client=name, reason="an answer to work that is closed: not used")
                    self._ports.sink.emit(refused)
                    return state
                record.bytes_up += reply.num_bytes
                if dispatched.trains:
                    self._accept_upload(reply, dispatched, record)
                else:
                    state = self._accept_evaluation(reply, dispatched, state)
                    # With a full buffer, it would train on a model that is about to be replaced.
                    if len(self._buffer) < self._size and name in self._membership.live():
                        self._send_training(name, state)
        return state

    def _receive_later(self, arrived: Arrived) -> None:
        """Keep an arrival. The file that a reply came in is gone by then, but not what was read of it."""
        if isinstance(arrived, ClientReady) and arrived.client not in self._tasks:
            return  # it has lost no task: sent twice, its second answer would not be expected
        self._later.append(replace(arrived, source=None) if isinstance(arrived, Reply) else arrived)

    def _accept_upload(self, reply: Reply, dispatched: DispatchedTask, record: _RoundRecord) -> None:
        """Validate an upload, and add it to the buffer if it is valid and not too stale."""
        name, key, most = reply.client, dispatched.broadcast.key, self._plan.max_staleness
        found, staleness = self._context.validator.validate(reply, key), self._buffer.staleness(key)
        if not isinstance(found, Participation):
            self._noise.note(name, found.upload.mechanism, size=found.upload.num_examples)
        if isinstance(found, Participation):
            record.waiting.add(name)  # otherwise it would be asked again at once, and fail again
            self._leave_out(record, name, found.status, found.reason, reply=reply)
            if isinstance(reply.message, Failure) and reply.message.refused:
                self._membership.on_refused(name, found.reason, doing=Purpose.TRAIN)
            will_repeat = isinstance(reply.message, Failure) and reply.message.will_repeat
            self._membership.on_failed(name, found.reason, will_repeat=will_repeat)
        elif most is not None and staleness > most:
            reason = f"it began {staleness} versions ago, --max-staleness is {most}"
            self._leave_out(record, name, ClientStatus.LATE, reason, staleness=staleness, reply=reply)
        elif self._sums is not None and (reason := self._sums.problem_with(name)):
            self._leave_out(record, name, ClientStatus.FAILED, reason, staleness=staleness, reply=reply)
        else:
            upload = found.upload
            self._buffer.add(name, upload, dispatched.broadcast.params, source_of(reply, upload))
            self._membership.on_succeeded(name)
            self._emit_upload(record, name, ClientStatus.COUNTED, "", reply, found.norm)

    def _accept_evaluation(self, reply: Reply, dispatched: DispatchedTask, state: ServerState) -> ServerState:
        name, message = reply.client, reply.message
        problem = problem_with_evaluation(reply, dispatched.broadcast.key, self._membership.num_validation(name))
        if problem or not isinstance(message, Evaluation) or not message.num_examples:
            reason = f"its evaluation is not used: {problem}"
            if isinstance(message, Failure) and message.refused:
                self._membership.on_refused(name, reason, doing=Purpose.EVALUATE)
                return state
            self._ports.sink.emit(ClientRefused(client=name, reason=reason))
            will_repeat = isinstance(message, Failure) and message.will_repeat
            self._membership.on_failed(name, reason, doing=Purpose.EVALUATE, will_repeat=will_repeat)
            return state
        self._membership.on_succeeded(name, doing=Purpose.EVALUATE)
        return replace(state, evaluated={**state.evaluated, name: (message.num_correct, message.num_examples)})

    def _drop_unreadable(self, record: _RoundRecord) -> bool:
        """Whether uploads could no longer be read: they are left out, and the buffer is not full any more."""
        found = self._buffer.drop_unreadable()
        for name, reason in found.items():
            self._leave_out(record, name, ClientStatus.REFUSED, reason)
        return bool(found)

    def _roll_back(self, record: _RoundRecord, problem: str) -> None:
        """Empty the buffer of the uploads that have destroyed the model, and exclude their clients for some rounds."""
        culprits = self._buffer.drop_outliers()
        for name, reason in culprits.items():
            self._membership.suspend(name, f"{problem}, and {reason}")
            self._leave_out(record, name, ClientStatus.REFUSED, f"{problem}, and {reason}")
        if not culprits:
            self._declare_void(record, problem)

    def _next_model(self, state: ServerState, record: _RoundRecord, opened: OpenRound) -> ModelState:
        """The model that the buffer makes of the current one, whose variances may be below zero.

        Raises:
            RefusedError: the uploads are summed, and their sum cannot be decrypted.
        """
        context, live = self._context, self._membership.live()
        if self._sums is not None:
            opened = replace(opened, key=replace(opened.key, attempt=record.num_void))
            uploads, present = self._buffer.uploads(), state.model.params
            aggregate, self._train_loss = self._sums.aggregate(
                uploads, present, opened, wait=lambda: self._dispatch_to_idle(state, record)
            )
            return context.algorithm.server_update(state.model, aggregate, population=len(live))
        aggregate = self._buffer.combine(
            context.algorithm, self._plan.aggregator, state.model.params, relative=self._relative,
            num_train={name: self._membership.num_train(name) for name in live},
        )  # fmt: skip
        return context.algorithm.server_update(state.model, aggregate, population=len(live))

    def _make_version(
        self, state: ServerState, model: ModelState, record: _RoundRecord
    ) -> tuple[ServerState, RoundFinished]:  # fmt: skip
        context, live = self._context, self._membership.live()
        plan = self._plan
        model = replace(model, params=context.model.layout.clamp(model.params))
        model = with_mean(model, round=record.number, num_rounds=plan.num_rounds, last=plan.average_rounds)
        updated = replace(
            state,
            round=record.number,
            model=context.downloads.advance(model, record.number),
            counted={**state.counted, **self._buffer.newest()},
            in_flight=self._tasks.in_flight(),
            void_rounds=state.void_rounds + record.num_void,
        )
        central, records = context.evaluate(updated), self._buffer.records()
        scores = [state.evaluated[name] for name in live if name in state.evaluated]
        claims = capped([min(count, self._plan.rounds.max_examples) for _, count in scores])
        accuracies = [correct / count for correct, count in scores]
        return updated, RoundFinished(
            round=record.number,
            attempt=record.num_void,
            clients=(*records, *record.in_order()),
            train_loss=weighted((member.train_loss, member.weight) for member in records)
            if self._sums is None
            else self._train_loss,
            accuracy=weighted(zip(accuracies, map(float, claims), strict=True)),
            central_accuracy=central.accuracy if central else None,
            central_loss=central.loss if central else None,
            seconds=self._ports.clock.now() - record.started,
            bytes_up=record.bytes_up,
            bytes_down=self._tasks.bytes_down,
            best_round=None,
        )

    def _model_at(self, version: int, state: ServerState) -> Tensor | None:
        """The model after `version` rounds as clients had it; None if it is lost."""
        if version == state.round:
            return state.model.published
        if version == 0:  # which has no checkpoint
            return self._context.model.initial
        kept = self._ports.checkpoints.load_round(version)
        return None if kept is None else kept.model.published

    def _have_all_failed(self, record: _RoundRecord) -> bool:
        """Declare the round void if all clients failed, and let them retry a limited number of times."""
        live = self._membership.live()
        if self._tasks or not live or not record.waiting.issuperset(live):
            return False
        self._declare_void(
            record, f"every live client has failed; uploads received: {len(self._buffer)} of {self._size}"
        )  # fmt: skip
        return True

    def _declare_void(self, record: _RoundRecord, reason: str) -> None:
        void = RoundVoid(round=record.number, attempt=record.num_void, reason=reason, clients=record.in_order())
        self._ports.sink.emit(void)
        record.num_void += 1
        if record.num_void >= MAX_VOID_IN_A_ROW:
            raise RunError(
                f"round {record.number} was void {MAX_VOID_IN_A_ROW} times in a row (the last time: {reason})"
            )
        record.waiting.clear()

    def _absence_reason(self, name: str, gone: bool) -> str:
        return self._membership.absence(name) if gone else f"no answer within {self._plan.rounds.timeout:g} s"

    def _leave_out(
        self, record: _RoundRecord, name: str, status: ClientStatus, reason: str, *, staleness: int | None = None,
        reply: Reply | None = None,
    ) -> None:  # fmt: skip
        """Record a client that was not counted. Only the last reason in a round is kept."""
        record.others[name] = Participation(
            client=name, status=status, reason=reason, staleness=staleness, number=self._size
        )
        self._emit_upload(record, name, status, reason, reply)

    def _emit_upload(
        self, record: _RoundRecord, name: str, status: ClientStatus, reason: str, reply: Reply | None = None,
        norm: float | None = None,
    ) -> None:  # fmt: skip
        source = reply.source if reply else None
        self._ports.sink.emit(
            UploadReceived(
                round=record.number, client=name, status=status, reason=reason, num_done=len(self._buffer),
                num_cohort=self._size, num_bytes=reply.num_bytes if reply else 0,
                digest=source.digest if source else "", norm=norm,
            )
        )  # fmt: skip
