"""The server's side of a synchronous round, top to bottom: draw, broadcast, collect, fold, evaluate, record."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedshelf.algorithms.base import Algorithm
from fedshelf.algorithms.reduce import MEAN, Aggregator, Verdict
from fedshelf.core.events import (
    ClientRefused,
    ClientStatus,
    Participation,
    RoundFinished,
    RoundStarted,
    RoundVoid,
    UploadReceived,
)
from fedshelf.core.messages import Broadcast, Evaluation, Failure, Purpose, TaskKey, Upload
from fedshelf.core.params import Layout
from fedshelf.core.ports import Clock, MetricSink, Spool, Transport
from fedshelf.core.state import OpenRound, ServerState
from fedshelf.rounds import cohort as cohorts
from fedshelf.rounds.aggregation import combine, weighted
from fedshelf.rounds.download import Downloads
from fedshelf.rounds.examination import Examiner, counted
from fedshelf.rounds.membership import Membership
from fedshelf.rounds.pipeline import UploadPipeline
from fedshelf.rounds.reception import POLL_SECONDS, Answer, Back, Reception
from fedshelf.training.trainer import Score


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


@dataclass(kw_only=True, eq=False)
class Tally:
    """How the members of a cohort have answered so far, and what that cost on the wire (a server that was restarted
    in the round knows only its own part of that)."""

    cohort: tuple[str, ...]
    members: dict[str, Participation] = field(default_factory=dict)
    evaluated: dict[str, int] = field(default_factory=dict)  # validation photos, of those who evaluated
    bytes_up: int = 0
    bytes_down: int = 0

    def pending(self) -> list[str]:
        return [name for name in self.cohort if name not in self.members]

    def counted(self) -> list[str]:
        """Names whose upload counts, sorted."""
        return sorted(n for n, member in self.members.items() if member.status is ClientStatus.COUNTED)


class SynchronousRound:
    """Runs single rounds on the ports it is given."""

    def __init__(
        self, *, algorithm: Algorithm, layout: Layout, settings: RoundSettings, transport: Transport,
        membership: Membership, reception: Reception, spool: Spool, sink: MetricSink, clock: Clock,
        uploads: UploadPipeline, downloads: Downloads, evaluate_centrally: Callable[[Tensor], Score] | None,
        aggregator: Aggregator = MEAN, virtual: Clock | None = None,
    ) -> None:  # fmt: skip
        self._algorithm = algorithm
        self._layout = layout
        self._settings = settings
        self._transport = transport
        self._membership = membership
        self._reception = reception
        self._spool = spool
        self._sink = sink
        self._clock = clock
        self._timer = virtual or clock
        self._examiner = Examiner(
            uploads=uploads, layout=layout, auxiliary=algorithm.auxiliary, max_examples=settings.max_examples
        )
        self._downloads = downloads
        self._evaluate_centrally = evaluate_centrally
        self._aggregator = aggregator

    def run(
        self, state: ServerState, opened: OpenRound, client_lr: float
    ) -> tuple[ServerState, RoundFinished] | RoundVoid:
        """One attempt at the round after `state`: the next state and its record, or why the attempt is void."""
        key, cohort = opened.key, opened.cohort
        started = self._clock.now()
        self._sink.emit(RoundStarted(round=key.round, attempt=key.attempt, cohort=cohort))
        tally = Tally(cohort=cohort)
        self._train(tally, state, key, client_lr)
        num_counted, needed = len(tally.counted()), cohorts.quorum(len(cohort), self._settings.quorum)
        if num_counted < needed:
            reason = f"{num_counted} of {len(cohort)} clients were counted, the quorum is {needed}"
            return RoundVoid(round=key.round, attempt=key.attempt, reason=reason, clients=_in_order(tally))
        next_state = self._aggregate(tally, state, key, population=len(opened.live))
        names = tally.counted()  # without those that the aggregator has left out
        self._evaluate(tally, next_state, key, names)
        central = self._evaluate_centrally(next_state.model) if self._evaluate_centrally else None
        weights = {name: float(tally.members[name].num_examples or 0) for name in names}
        accuracies = {name: tally.members[name].accuracy for name in tally.evaluated}
        return next_state, RoundFinished(
            round=key.round,
            attempt=key.attempt,
            clients=_in_order(tally),
            train_loss=weighted({name: tally.members[name].train_loss for name in names}, weights),
            accuracy=weighted(accuracies, {name: float(count) for name, count in tally.evaluated.items()}),
            central_accuracy=central.accuracy if central else None,
            central_loss=central.loss if central else None,
            seconds=self._clock.now() - started,
            bytes_up=tally.bytes_up,
            bytes_down=tally.bytes_down,
            best_round=None,
        )

    def _train(self, tally: Tally, state: ServerState, key: TaskKey, client_lr: float) -> None:
        """Ask the cohort to train and spool what comes back until all have answered or the deadline has passed."""
        for name in self._spool.names(key):  # what a server that crashed in this round had already received
            upload = self._spool.get(key, name)
            if name in tally.cohort and isinstance(upload, Upload):
                self._note(tally, key, counted(name, upload))

        beside = self._algorithm.broadcast(state, self._layout.num_trainable)

        def broadcast(name: str) -> Broadcast:
            return Broadcast(
                key=key, purpose=Purpose.TRAIN, params=state.model, client_lr=client_lr, auxiliary=beside,
                counted=state.counted.get(name),
            )  # fmt: skip

        def settle(answer: Answer) -> None:
            self._note(tally, key, self._receive(answer, key))

        self._ask(tally.pending(), key, broadcast, settle, tally)
        for name in tally.pending():
            if self._membership.address(name) is None:
                self._note(tally, key, Participation(client=name, status=ClientStatus.OFFLINE, reason="not connected"))
            else:
                reason = f"no answer within {self._settings.timeout:g} s"
                self._note(tally, key, Participation(client=name, status=ClientStatus.LATE, reason=reason))

    def _receive(self, answer: Answer, key: TaskKey) -> Participation:
        """Examine an answer to a training task; an upload that passes is spooled."""
        found = self._examiner.examine(answer, key)
        if isinstance(found, Participation):
            return found
        self._spool.put(key, answer.client, found.upload, found.source)
        return counted(answer.client, found.upload)

    def _aggregate(self, tally: Tally, state: ServerState, key: TaskKey, population: int) -> ServerState:
        """The state with the new model. Whom the aggregator leaves out of that is refused: what the round changed at
        such a client must not last, for the server knows nothing of it."""
        names = tally.counted()
        uploads = [upload for name in names if isinstance(upload := self._spool.get(key, name), Upload)]
        alike = self._settings.equal_weights
        weights = [1.0 if alike else self._algorithm.weight(upload, staleness=0) for upload in uploads]
        aggregate, verdicts = combine(uploads, weights, self._aggregator, num_trainable=self._layout.num_trainable)
        for name, verdict in zip(names, verdicts, strict=True):
            tally.members[name] = _judged(tally.members[name], verdict)
        names = tally.counted()
        updated = self._algorithm.server_update(state, aggregate, population)
        return self._downloads.advance(
            replace(
                updated,
                round=key.round,
                params=self._layout.clamp(updated.params),
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
            problem = self._problem_with_evaluation(answer, key)
            if problem:
                self._sink.emit(ClientRefused(client=answer.client, reason=f"its evaluation is not used: {problem}"))
            elif isinstance(answer.message, Evaluation) and answer.message.num_examples:
                accuracy = answer.message.num_correct / answer.message.num_examples
                tally.members[answer.client] = replace(tally.members[answer.client], accuracy=accuracy)
                tally.evaluated[answer.client] = min(answer.message.num_examples, self._settings.max_examples)

        self._ask(asked, key, broadcast, settle, tally)

    def _problem_with_evaluation(self, answer: Answer, key: TaskKey) -> str:
        """Why an answer to an evaluation is not used; empty if it is."""
        message = answer.message
        if isinstance(message, Failure):
            return message.reason
        if not isinstance(message, Evaluation):
            return answer.reason or "it is something else"
        if message.key != key:
            return "it is for other work"
        if not 0 <= message.num_correct <= message.num_examples:
            return f"it claims {message.num_correct} of {message.num_examples} photos to be right"
        if message.num_examples != self._membership.num_validation(answer.client):
            return f"it is of {message.num_examples} photos, not of those that the client came with"
        return ""

    def _ask(
        self, names: Iterable[str], key: TaskKey, broadcast: Callable[[str], Broadcast],
        settle: Callable[[Answer], None], tally: Tally,
    ) -> None:  # fmt: skip
        """Send `broadcast` to each of `names` and pass their answers to `settle` until there is one from every client
        that is (or may yet come) live, or the time is up."""
        pending = set(names)
        deadline = self._timer.now() + self._settings.timeout

        def send(name: str) -> None:
            address = self._membership.address(name)
            if address is not None:
                message = self._downloads.message(address, broadcast(name), came_with=self._membership.holds(name))
                tally.bytes_down += self._transport.send(address, message)

        for name in sorted(pending):
            send(name)
        while any(self._may_answer(name) for name in pending) and self._timer.now() < deadline:
            match self._reception.poll(min(POLL_SECONDS, max(0.0, deadline - self._timer.now()))):
                case Back(client=name):
                    if name in pending:
                        send(name)  # it was away, or is another process now: the task it was sent before is lost
                case Answer(client=name, task=task) as answer:
                    if name not in pending or task not in (key, None):
                        self._sink.emit(ClientRefused(client=name, reason="an answer to work that is closed: not used"))
                    else:
                        self._hears(answer)
                        tally.bytes_up += answer.num_bytes
                        pending.remove(name)
                        settle(answer)

    def _hears(self, answer: Answer) -> None:
        """Whoever has answered holds the model that it was sent."""
        address = self._membership.address(answer.client)
        if address is not None:
            self._downloads.answered(address, failed=answer.message is None or isinstance(answer.message, Failure))

    def _may_answer(self, name: str) -> bool:
        return self._membership.address(name) is not None or name in self._membership.returning()

    def _note(self, tally: Tally, key: TaskKey, member: Participation) -> None:
        tally.members[member.client] = member
        self._sink.emit(
            UploadReceived(
                round=key.round, client=member.client, status=member.status, reason=member.reason,
                num_done=len(tally.members), num_cohort=len(tally.cohort),
            )
        )  # fmt: skip


def _judged(member: Participation, verdict: Verdict) -> Participation:
    status = ClientStatus.REFUSED if verdict.left_out else member.status
    return replace(member, status=status, reason=verdict.reason)


def _in_order(tally: Tally) -> tuple[Participation, ...]:
    return tuple(tally.members[name] for name in sorted(tally.members))
