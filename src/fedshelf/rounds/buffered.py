"""The server's side of asynchronous rounds, top to bottom: keep clients at work, buffer what comes in, make a version.

A round is one server update, made as soon as the buffer is full; who is still at work then goes on, and its upload is
stale by so many versions when it comes. Nobody waits for anybody.

A client that is about to train is asked first how the model does that it is given, so that a round's accuracy is over
the newest such figures of all live clients: measured while nobody waits, and older than the round's own model by a task.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedshelf.algorithms.base import Algorithm, Asynchronous
from fedshelf.algorithms.reduce import MEAN, Aggregator
from fedshelf.core.choices import SamplingName
from fedshelf.core.errors import RunError
from fedshelf.core.events import (
    ClientRefused,
    ClientStatus,
    Participation,
    RoundFinished,
    RoundStarted,
    RoundVoid,
    UploadReceived,
)
from fedshelf.core.messages import Broadcast, Evaluation, Failure, Purpose, TaskKey
from fedshelf.core.params import Layout
from fedshelf.core.ports import Checkpoints, Clock, MetricSink, Spool, Timeline, Transport
from fedshelf.core.rng import Rng
from fedshelf.core.state import InFlight, ServerState
from fedshelf.rounds import cohort as cohorts
from fedshelf.rounds.aggregation import weighted
from fedshelf.rounds.buffer import Buffer
from fedshelf.rounds.central import CentralTest
from fedshelf.rounds.download import Downloads
from fedshelf.rounds.examination import Examiner, problem_with_evaluation
from fedshelf.rounds.membership import Membership
from fedshelf.rounds.pipeline import UploadPipeline
from fedshelf.rounds.reception import POLL_SECONDS, Answer, Back, Reception

log = logging.getLogger(__name__)

MAX_VOID_IN_A_ROW = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class BufferedSettings:
    """How many clients are at work, and what becomes of slow ones.

    `timeout` in seconds is how long a task may take; `max_staleness` in versions, how old a model an upload may have
    begun with (None: any). `start_clients` and `min_clients`, `fraction`, `sampling` and `max_examples` are as in
    synchronous rounds, a cohort being who is at work at one time.
    """

    run_id: str
    start_clients: int
    min_clients: int
    fraction: float
    sampling: SamplingName
    timeout: float
    max_examples: int
    max_staleness: int | None


@dataclass(kw_only=True, eq=False)
class Flight:
    """A task that is out: what was sent, and until when its answer counts (seconds of the timer)."""

    broadcast: Broadcast
    deadline: float


@dataclass(kw_only=True, eq=False)
class _Account:
    """One round's books: what it cost, who was not counted, how often it was void, and who has failed and waits for the
    next version."""

    started: float
    bytes_up: int = 0
    bytes_down: int = 0
    num_drawn: int = 0
    num_void: int = 0
    others: dict[str, Participation] = field(default_factory=dict)
    resting: set[str] = field(default_factory=set)


class BufferedRounds:
    """Runs one version after the other on the ports it is given; tasks outlive the round that they began in."""

    def __init__(
        self, *, algorithm: Algorithm, layout: Layout, settings: BufferedSettings, rng: Rng, transport: Transport,
        membership: Membership, reception: Reception, spool: Spool, checkpoints: Checkpoints, sink: MetricSink,
        clock: Clock, uploads: UploadPipeline, downloads: Downloads, test: CentralTest, aggregator: Aggregator = MEAN,
        virtual: Timeline | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(algorithm, Asynchronous):
            raise TypeError(f"{type(algorithm).__name__} does not say how many uploads make a version")
        self._algorithm: Algorithm = algorithm
        self._size, self._relative = algorithm.buffer_size, algorithm.relative_to_present
        self._layout = layout
        self._settings = settings
        self._rng = rng
        self._transport = transport
        self._membership = membership
        self._reception = reception
        self._checkpoints = checkpoints
        self._sink = sink
        self._clock = clock
        self._timer = virtual or clock
        self._downloads = downloads
        self._test = test
        self._aggregator = aggregator
        self._examiner = Examiner(
            uploads=uploads, layout=layout, auxiliary=algorithm.auxiliary, max_examples=settings.max_examples
        )
        self._buffer = Buffer(spool=spool, layout=layout, run_id=settings.run_id)
        self._flights: dict[str, Flight] = {}
        self._lost: dict[str, InFlight] = {}  # of a server before this one, until their clients are back

    def resume(self, state: ServerState) -> None:
        """What was out when `state` was saved is sent again, to each client as it comes back."""
        self._lost = {flight.client: flight for flight in state.in_flight if flight.wanted}

    def run(self, state: ServerState, client_lr: float) -> tuple[ServerState, RoundFinished]:
        """Fill the buffer, and return the next state and its record.

        Raises:
            RunError: the version could not be made, however often it was tried.
        """
        account = _Account(started=self._clock.now())
        self._buffer.open(state.round + 1, lambda version: self._model_at(version, state))
        self._keep_busy(state, client_lr, account)
        self._sink.emit(RoundStarted(round=state.round + 1, attempt=0, cohort=tuple(sorted(self._flights))))
        while len(self._buffer) < self._size:
            state = self._receive(state, client_lr, account)
            self._keep_busy(state, client_lr, account)
            self._give_up_if_all_have_failed(state, account)
        return self._make_version(state, account)

    def _keep_busy(self, state: ServerState, client_lr: float, account: _Account) -> None:
        """Forget who has gone or takes too long, and give work to as many clients as there should be at work."""
        for name, flight in list(self._flights.items()):
            if self._membership.address(name) is None and name not in self._membership.returning():
                del self._flights[name]
                self._note(state, account, name, ClientStatus.OFFLINE, "not connected")
            elif self._timer.now() >= flight.deadline:
                del self._flights[name]
                reason = f"no answer within {self._settings.timeout:g} s"
                self._note(state, account, name, ClientStatus.LATE, reason)
        if len(self._buffer) >= self._size:
            return
        settings, live = self._settings, self._membership.live()
        if len(live) < (settings.start_clients if state.round == 0 else settings.min_clients):
            return
        for name in [name for name in live if name in self._lost and name not in self._flights]:
            self._send_again(name, self._lost.pop(name), state, client_lr, account)
        if self._membership.returning():
            return  # or a restarted server would draw among those who were quicker to come back
        idle = [n for n in live if n not in self._flights and n not in account.resting]
        wanted = cohorts.size(len(live), fraction=settings.fraction, min_clients=settings.min_clients)
        count = min(len(idle), wanted - len(self._flights))
        if count > 0:
            for name in self._draw(idle, count, state, account):
                self._send(name, state, client_lr, account)

    def _draw(self, idle: Sequence[str], count: int, state: ServerState, account: _Account) -> tuple[str, ...]:
        number = state.round + 1
        most = self._settings.max_examples
        weights = cohorts.sampling_weights(
            self._settings.sampling, idle, times_live=state.times_live, round=number,
            num_train={name: min(self._membership.num_train(name), most) for name in idle},
        )  # fmt: skip
        account.num_drawn += 1
        rng = self._rng.fork(round=number, purpose=f"cohort-{account.num_drawn}")
        return cohorts.draw(idle, count, rng, weights)

    def _send(self, name: str, state: ServerState, client_lr: float, account: _Account) -> None:
        """Give a client its next task: to evaluate the present model if it has photos for that, then to train."""
        if self._membership.num_validation(name):
            key = TaskKey(run_id=self._settings.run_id, round=state.round, attempt=0)
            broadcast = Broadcast(key=key, purpose=Purpose.EVALUATE, params=state.model, client_lr=0.0)
            self._hand_out(name, broadcast, account)
        else:
            self._send_training(name, state, client_lr, account)

    def _send_training(self, name: str, state: ServerState, client_lr: float, account: _Account) -> None:
        number = state.round + 1
        attempt = self._buffer.num_answered(name, number)
        key = TaskKey(run_id=self._settings.run_id, round=number, attempt=attempt)
        self._hand_out(name, self._training(name, key, state, state.model, client_lr), account)

    def _send_again(
        self, name: str, lost: InFlight, state: ServerState, client_lr: float, account: _Account
    ) -> None:  # fmt: skip
        """Ask for what was out when a server before this one stopped."""
        params = self._model_at(lost.key.round - 1, state)
        if params is not None:
            self._hand_out(name, self._training(name, lost.key, state, params, client_lr), account)

    def _training(
        self, name: str, key: TaskKey, state: ServerState, params: Tensor, client_lr: float
    ) -> Broadcast:  # fmt: skip
        return Broadcast(
            key=key, purpose=Purpose.TRAIN, params=params, client_lr=client_lr,
            auxiliary=self._algorithm.broadcast(state, self._layout.num_trainable),
            counted=self._buffer.newest().get(name, state.counted.get(name)),
        )  # fmt: skip

    def _hand_out(self, name: str, broadcast: Broadcast, account: _Account) -> None:
        flight = Flight(broadcast=broadcast, deadline=self._timer.now() + self._settings.timeout)
        self._flights[name] = flight
        address = self._membership.address(name)
        if address is not None:
            message = self._downloads.message(address, broadcast, came_with=self._membership.holds(name))
            account.bytes_down += self._transport.send(address, message)

    def _receive(self, state: ServerState, client_lr: float, account: _Account) -> ServerState:
        """Deal with the next arrival; return the state with what is known of clients since."""
        match self._reception.poll(POLL_SECONDS):
            case Back(client=name) if name in self._flights:
                self._hand_out(name, self._flights[name].broadcast, account)  # what it was sent before is lost
            case Answer(client=name, task=task) as answer:
                flight = self._flights.get(name)
                if flight is None or task not in (flight.broadcast.key, None):
                    self._sink.emit(ClientRefused(client=name, reason="an answer to work that is closed: not used"))
                    return state
                account.bytes_up += answer.num_bytes
                self._hears(answer)
                del self._flights[name]
                if flight.broadcast.purpose is Purpose.TRAIN:
                    self._take(answer, flight.broadcast, state, account)
                else:
                    state = self._take_evaluation(answer, flight.broadcast.key, state)
                    self._send_training(name, state, client_lr, account)
        return state

    def _take(self, answer: Answer, broadcast: Broadcast, state: ServerState, account: _Account) -> None:
        """Examine an upload, and take it into the buffer if it passes and is not too old."""
        name, key, most = answer.client, broadcast.key, self._settings.max_staleness
        found = self._examiner.examine(answer, key)
        staleness = self._buffer.staleness(key)
        if isinstance(found, Participation):
            account.resting.add(name)  # or it would be asked again at once, and fail again
            self._note(state, account, name, found.status, found.reason)
        elif most is not None and staleness > most:
            reason = f"it began {staleness} versions ago, --max-staleness is {most}"
            self._note(state, account, name, ClientStatus.LATE, reason, staleness=staleness)
        else:
            self._buffer.add(name, found, broadcast.params)
            self._emit(state, account, name, ClientStatus.COUNTED, "")

    def _take_evaluation(self, answer: Answer, key: TaskKey, state: ServerState) -> ServerState:
        problem = problem_with_evaluation(answer, key, self._membership.num_validation(answer.client))
        if problem or not isinstance(answer.message, Evaluation):
            self._sink.emit(ClientRefused(client=answer.client, reason=f"its evaluation is not used: {problem}"))
            return state
        score = (answer.message.num_correct, answer.message.num_examples)
        return replace(state, evaluated={**state.evaluated, answer.client: score})

    def _make_version(self, state: ServerState, account: _Account) -> tuple[ServerState, RoundFinished]:
        live = self._membership.live()
        aggregate = self._buffer.combine(self._algorithm, self._aggregator, state.params, relative=self._relative)
        newest, records = self._buffer.newest(), self._buffer.records()
        updated = self._algorithm.server_update(state, aggregate, population=len(live))
        updated = self._downloads.advance(
            replace(
                updated,
                round=state.round + 1,
                params=self._layout.clamp(updated.params),
                counted={**state.counted, **newest},
                in_flight=self._in_flight(),
                void_rounds=state.void_rounds + account.num_void,
            )
        )
        central = self._test.score(updated)
        scores = {name: state.evaluated[name] for name in live if name in state.evaluated}
        most = self._settings.max_examples
        return updated, RoundFinished(
            round=updated.round,
            attempt=account.num_void,
            clients=(*records, *(account.others[name] for name in sorted(account.others))),
            train_loss=_mean([(record.train_loss, float(record.num_examples or 0)) for record in records]),
            accuracy=_mean([(correct / count, float(min(count, most))) for correct, count in scores.values()]),
            central_accuracy=central.accuracy if central else None,
            central_loss=central.loss if central else None,
            seconds=self._clock.now() - account.started,
            bytes_up=account.bytes_up,
            bytes_down=account.bytes_down,
            best_round=None,
        )

    def _in_flight(self) -> tuple[InFlight, ...]:
        """The training that is out, to be written down."""
        return tuple(
            InFlight(client=name, key=flight.broadcast.key)
            for name, flight in sorted(self._flights.items())
            if flight.broadcast.purpose is Purpose.TRAIN
        )

    def _model_at(self, version: int, state: ServerState) -> Tensor | None:
        """The model after `version` rounds as clients had it; None where it is lost."""
        if version == state.round:
            return state.model
        kept = self._checkpoints.load_round(version)
        return None if kept is None else kept.model

    def _hears(self, answer: Answer) -> None:
        """Whoever has answered holds the model that it was sent."""
        address = self._membership.address(answer.client)
        if address is not None:
            self._downloads.answered(address, failed=answer.message is None or isinstance(answer.message, Failure))

    def _give_up_if_all_have_failed(self, state: ServerState, account: _Account) -> None:
        """With everybody's work refused or failed the round is void: they are asked again, but not for ever."""
        live = self._membership.live()
        if self._flights or not live or not account.resting.issuperset(live):
            return
        reason = f"all {len(live)} live clients have failed, {len(self._buffer)} of {self._size} uploads are in"
        clients = tuple(account.others[name] for name in sorted(account.others))
        number = state.round + 1
        self._sink.emit(RoundVoid(round=number, attempt=account.num_void, reason=reason, clients=clients))
        account.num_void += 1
        if account.num_void >= MAX_VOID_IN_A_ROW:
            raise RunError(f"round {number} was void {MAX_VOID_IN_A_ROW} times in a row, last because {reason}")
        account.resting.clear()

    def _note(
        self, state: ServerState, account: _Account, name: str, status: ClientStatus, reason: str, *,
        staleness: int | None = None,
    ) -> None:  # fmt: skip
        """Record who was not counted; of several reasons in a round, the last."""
        account.others[name] = Participation(
            client=name, status=status, reason=reason, staleness=staleness, number=self._size
        )
        self._emit(state, account, name, status, reason)

    def _emit(self, state: ServerState, account: _Account, name: str, status: ClientStatus, reason: str) -> None:
        self._sink.emit(
            UploadReceived(
                round=state.round + 1, client=name, status=status, reason=reason,
                num_done=len(self._buffer), num_cohort=self._size,
            )
        )  # fmt: skip


def _mean(pairs: Sequence[tuple[float | None, float]]) -> float | None:
    return weighted(
        {str(i): value for i, (value, _) in enumerate(pairs)}, {str(i): weight for i, (_, weight) in enumerate(pairs)}
    )
