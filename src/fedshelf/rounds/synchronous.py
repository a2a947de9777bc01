"""Synchronous rounds: draw, broadcast, collect, aggregate, check, evaluate, record."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fedshelf.algorithms.aggregation import weighted
from fedshelf.core.errors import RefusedError, RunError
from fedshelf.core.events import ClientStatus, RoundFinished, RoundStarted, RoundVoid
from fedshelf.core.messages import Evaluation, TaskKey
from fedshelf.core.state import OpenRound, ServerState
from fedshelf.rounds.divergence import problem_with_loss, problem_with_step
from fedshelf.rounds.plan import MAX_VOID_IN_A_ROW, Context
from fedshelf.rounds.round_progress import RoundProgress
from fedshelf.rounds.round_steps import RoundSteps
from fedshelf.rounds.sums.encrypted_uploads import EncryptedRound
from fedshelf.rounds.sums.evaluations import SummedEvaluation
from fedshelf.rounds.sums.key_exchange import KeyExchange
from fedshelf.rounds.sums.uploads import MaskedRound
from fedshelf.scheduling.cohort import quorum
from fedshelf.scheduling.pace import updated


class SynchronousRounds:
    """Makes one version after another; retries each round until it has its quorum."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._steps = RoundSteps(context)
        self._is_noisy = context.plan.noisy_mean is not None
        form, encryption = context.encrypted_form, context.plan.encryption
        self._keys = None if form is None else KeyExchange(context, encryption, form)
        self._opened: OpenRound | None = None
        self._first_attempt = 0
        self._evaluations: Mapping[str, Evaluation | None] = {}
        self._held_out: Tensor | None = None
        self._recorded: list[frozenset[str]] = []
        self._summed: SummedEvaluation | None = None

    def resume(self, state: ServerState, opened: OpenRound | None) -> None:
        """Resume the round that a previous server process had opened."""
        self._opened, self._first_attempt = opened, 0
        if self._keys is not None:
            self._keys.resume(opened)
        elif opened is not None and self._context.uploads.is_masked and not opened.masking:
            # The members' keys are gone with the server that they were shown to.
            self._opened, self._first_attempt = None, opened.key.attempt + 1
        members, grace = self._context.membership, self._context.plan.rounds.rejoin_grace
        members.expect(opened.live if opened else (), grace)

    def evaluations(self) -> Mapping[str, Evaluation | None]:
        """See `Rounds`. A member of the cohort that was not counted is not asked again."""
        return self._evaluations

    def held_out(self) -> Tensor | None:
        """See `Rounds`."""
        return self._held_out

    def summed(self) -> SummedEvaluation | None:
        """See `Rounds`."""
        return self._summed

    def next(self, state: ServerState) -> tuple[ServerState, RoundFinished, Sequence[str]]:
        """Run a round.

        Returns:
            The next state, its record, and the clients that were live when the cohort was drawn.

        Raises:
            RunError: all attempts at the round were void, or no client is left.
        """
        opened, attempt, summary = self._opened, self._first_attempt, ""
        self._first_attempt = 0
        self._recorded = []
        num_void = 0  # without attempts in which a client failed: failures exclude clients, so there are only so many
        while num_void < MAX_VOID_IN_A_ROW:
            if opened is None or opened.key.round != state.round + 1 or opened.key.attempt < attempt:
                settled = self._keys.settled if self._keys else ""
                opened = self._steps.draw(state, attempt, self._recorded, encryption=settled)
            num_faults = self._context.membership.num_faults
            state, outcome = self._attempt(state, opened)
            if isinstance(outcome, RoundFinished):
                return state, outcome, opened.live
            self._context.ports.sink.emit(outcome)
            state, attempt = replace(state, void_rounds=state.void_rounds + 1), outcome.attempt + 1
            summary = _summary(outcome)
            num_void += self._context.membership.num_faults == num_faults
        raise RunError(f"round {state.round + 1} was void {MAX_VOID_IN_A_ROW} times in a row. {summary}")

    def _attempt(self, state: ServerState, opened: OpenRound) -> tuple[ServerState, RoundFinished | RoundVoid]:
        """Attempt the round after `state`.

        Returns:
            The next state and its record; or the same round's state and why the attempt is void.
        """
        context, steps, key = self._context, self._steps, opened.key
        started = context.ports.clock.now()
        context.ports.sink.emit(RoundStarted(round=key.round, attempt=key.attempt, cohort=opened.cohort))
        assignment = context.plan.pacing.assign(opened)
        needed = quorum(assignment.wanted, context.plan.rounds.quorum)
        progress = RoundProgress(cohort=opened.cohort, assignment=assignment, needed=needed)

        summand = context.uploads.summand
        masks: MaskedRound | EncryptedRound | None = None
        steps.restore(progress, key)
        try:
            if self._keys is not None:
                masks = EncryptedRound(context, self._keys, progress, opened)
                masks.begin()
            elif summand is not None and context.uploads.is_masked:
                masks = MaskedRound(context, summand, progress, opened)
                masks.begin(state)
        except RefusedError as error:
            return state, _void(progress, key, str(error))
        if masks is None or not masks.is_closed:
            delivery = (masks.delivery,) if isinstance(masks, MaskedRound) else ()
            steps.collect(progress, state, key, *delivery)
        if not context.algorithm.sums:  # which takes no steps of training
            pace = updated(state.pace, seen=progress.pace, at_least=progress.pace_bounds(context.timer.now()))
            state = replace(state, pace=pace)
        uploads, problem = steps.load(progress, key), ""
        while len(uploads) >= needed:
            try:
                model, verdicts = steps.fold(progress, uploads, state, opened, masks)
            except RefusedError as error:
                if isinstance(masks, MaskedRound) and masks.recorded:
                    self._note_recorded(masks.recorded)
                if summand is not None:
                    return state, _void(progress, key, str(error))
                problem = str(error)
            else:
                problem = problem_with_step(
                    state.model.params, model, num_trainable=context.model.layout.num_trainable,
                    is_solution=context.algorithm.sums,
                )  # fmt: skip
            # With noise on the sum, a second sum without some uploads would be a second release.
            if (
                not problem
                or self._is_noisy
                or summand
                or not steps.quarantine(progress, uploads, problem, state.model)
            ):
                break
        if problem or len(uploads) < needed:
            reason = f"counted {len(uploads)} of {assignment.wanted}, the quorum is {needed}"
            return state, _void(progress, key, f"{DESTROYED}: {problem}" if problem else reason)

        model = steps.choose(progress, model, key)
        next_state = steps.advance(progress, state, model, verdicts, key)
        steps.evaluate(progress, next_state, key)
        self._evaluations = {**dict.fromkeys(opened.cohort), **progress.evaluations}
        self._held_out, self._summed = progress.held_out, progress.summed
        score = context.evaluate(next_state)
        losses: Iterable[float] = () if self._is_noisy else progress.losses.values()  # those of stores have no noise
        if summand is not None:
            loss = progress.summed.loss if progress.summed else None
            losses = () if loss is None else (loss,)
        if problem := problem_with_loss(losses, score.loss if score else None):
            context.downloads.restart()
            if not self._is_noisy and summand is None:
                steps.quarantine(progress, uploads, problem, state.model)
            return state, _void(progress, key, f"{DESTROYED}: {problem}")

        counted, evaluated = [progress.members[n] for n in progress.counted()], sorted(progress.evaluated.items())
        return next_state, RoundFinished(
            round=key.round,
            attempt=key.attempt,
            clients=progress.participations(),
            train_loss=weighted((member.train_loss, member.weight) for member in counted)
            if summand is None
            else progress.train_loss,
            accuracy=weighted((progress.members[name].accuracy, float(count)) for name, count in evaluated)
            if summand is None
            else progress.summed.accuracy
            if progress.summed
            else None,
            central_accuracy=score.accuracy if score else None,
            central_loss=score.loss if score else None,
            seconds=context.ports.clock.now() - started,
            bytes_up=progress.bytes_up,
            bytes_down=progress.bytes_down,
            best_round=None,
        )

    def _note_recorded(self, names: frozenset[str]) -> None:
        """Note whose sum could not be opened though members have recorded it, and give them time to come back.

        They open the same sum again, but none that differs by few.
        """
        self._recorded.append(names)
        members = self._context.membership
        missing = names & members.missing()
        members.expect(missing, self._context.plan.rounds.rejoin_grace)


def _void(progress: RoundProgress, key: TaskKey, reason: str) -> RoundVoid:
    return RoundVoid(round=key.round, attempt=key.attempt, reason=reason, clients=progress.participations())


def _summary(void: RoundVoid) -> str:
    """Summarize the last attempt client by client, with advice."""
    others = [member for member in void.clients if member.status is not ClientStatus.COUNTED]
    named = [f"{member.client}: {member.status.value} ({member.reason})" for member in others]
    more = f"; and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
    statuses = {member.status for member in others}
    advice = [text for status, text in ADVICE.items() if status in statuses]
    if void.reason.startswith(DESTROYED):
        advice.append("Lower the learning rates (--client-lr, --server-lr) if training diverges without an attack.")
    return f"In the last attempt {'; '.join([void.reason, *named[:MOST_NAMED]])}{more}. {' '.join(advice)}"


DESTROYED = "the model is destroyed"
MOST_NAMED = 8  # clients in one message
ADVICE = {
    ClientStatus.LATE: "Give late clients more time (--round-timeout) or less work (--local-work dynamic), or ask for "
    "fewer uploads (--quorum).",
    ClientStatus.OFFLINE: "Start the clients that are offline again, or ask for fewer uploads (--quorum).",
    ClientStatus.FAILED: "Fix what made clients fail: their own logs say more.",
    ClientStatus.REFUSED: "Fix what made uploads unusable: their clients' logs say more.",
}
"""Advice by client status."""
