"""The steps of a synchronous round on the server: draw a cohort, collect uploads, aggregate, evaluate."""

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial

from torch import Tensor

from fedshelf.algorithms.aggregation import (
    TIMES_COUNT,
    capped,
    combine,
    normalized,
    nothing,
    outliers,
    rescaled,
    weighted,
)
from fedshelf.algorithms.base import Aggregate
from fedshelf.algorithms.reduce import Verdict
from fedshelf.core import text
from fedshelf.core.errors import RefusedError, RunError
from fedshelf.core.events import ClientRefused, ClientStatus, Participation, UploadReceived
from fedshelf.core.messages import (
    CANDIDATES,
    PARAMS,
    Broadcast,
    Evaluation,
    Failure,
    Mechanism,
    Purpose,
    TaskKey,
    Upload,
    auxiliary_vectors,
)  # fmt: skip
from fedshelf.core.params import Segment
from fedshelf.core.ports import Reply
from fedshelf.core.state import ModelState, OpenRound, ServerState
from fedshelf.data.product_tree import ProductTree
from fedshelf.privacy.client_dp import JointClip, Within
from fedshelf.privacy.noise import new_key
from fedshelf.privacy.secure_aggregation.context import LEAST_MEMBERS
from fedshelf.privacy.secure_aggregation.unmasking import apart
from fedshelf.rounds.averaging import with_mean
from fedshelf.rounds.dispatch import Patience
from fedshelf.rounds.plan import Context
from fedshelf.rounds.reported_noise import ReportedNoise
from fedshelf.rounds.round_progress import RoundProgress
from fedshelf.rounds.sums.encrypted_uploads import EncryptedRound
from fedshelf.rounds.sums.evaluations import EvaluationCodes, SummedEvaluation
from fedshelf.rounds.sums.masked_evaluations import MaskedEvaluation
from fedshelf.rounds.sums.uploads import MaskedRound, named_clip_norm, summed
from fedshelf.rounds.validation import counted, problem_with_evaluation, problem_with_scores, source_of, summed_scores
from fedshelf.scheduling import cohort as cohorts
from fedshelf.scheduling.pace import predicted

EVALUATION_FACTOR, MIN_EVALUATION_SECONDS = 10.0, 60.0  # see `Patience`: machines differ by less
logger = logging.getLogger(__name__)


class RoundSteps:
    """The steps of a round, in the order of the methods."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._plan = context.plan
        self._ports = context.ports
        self._algorithm = context.algorithm
        self._layout = context.model.layout
        self._membership = context.membership
        self._downloads = context.downloads
        self._dispatcher = context.dispatcher
        self._validator = context.validator
        self._timer = context.timer
        self._most_live = context.plan.start_clients
        self._was_alone = False
        self._num_live = context.plan.start_clients
        is_masked = context.uploads.is_masked
        self._least = max(LEAST_MEMBERS, context.plan.threshold or 0) if is_masked else 1
        plan = context.plan
        self._noise = ReportedNoise(context.ports.sink, delta=plan.delta, num_rounds=plan.num_rounds)
        if (noisy := plan.noisy_mean) is not None:
            server = Mechanism(noise_multiplier=noisy.noise_multiplier, sampling_rate=noisy.sampling_rate, steps=1)
            self._noise.note("", server, size=plan.start_clients, is_discrete=noisy.noise_at == "stores")
            expected = plan.fraction * plan.start_clients
            loudness = noisy.deviations(expected)[0] * math.sqrt(self._layout.num_trainable) / expected
            head = f"{context.model.head}."
            trained = [spec.name for spec in self._layout.tensors if spec.segment is Segment.TRAINABLE]
            is_head_only = bool(context.model.head) and all(name.startswith(head) for name in trained)
            self._noise.warn_of_volume(loudness, trains_head_only=is_head_only)

    def draw(
        self, state: ServerState, attempt: int, recorded: Iterable[frozenset[str]] = (), *, encryption: str = ""
    ) -> OpenRound:  # fmt: skip
        """Wait until enough clients are live, draw the cohort, and save it before any task is sent.

        Args:
            state: the state before the round.
            attempt: the attempt at it.
            recorded: whose sums members have recorded as opened in attempts before.
            encryption: what a restarted server needs to know of encryption.

        Raises:
            RunError: all clients have been excluded.
        """
        plan, number = self._plan, state.round + 1
        self._membership.begin_round(number)
        self._wait_for_clients(number, starts=number == self._plan.first_round and attempt == 0)
        live = self._membership.live()
        self._warn_if_alone(number, live, in_model=state.photos.keys())
        self._warn_if_fewer(number, live)
        fraction = 1.0 if self._context.closed_form else plan.fraction  # the sums are those of all photos
        count = cohorts.size(len(live), fraction=fraction)
        rng = plan.rng.fork(round=number, purpose=f"cohort-{attempt}")
        key = TaskKey(run_id=plan.run_id, round=number, attempt=attempt)
        claims = capped([min(self._membership.num_train(name), plan.rounds.max_examples) for name in live])
        num_train = dict(zip(live, claims, strict=True))
        weights = cohorts.sampling_weights(
            plan.sampling, live, num_train=num_train, times_live=state.times_live, round=number
        )
        asked = cohorts.over_selected(count, len(live), plan.pacing.over_selection)
        if plan.noisy_mean is None or self._context.uploads.is_masked:  # whose members know each other's names
            cohort = apart(cohorts.draw(live, asked, rng, weights), recorded, least=self._least)
            count = min(count, len(cohort))
        else:
            cohort = cohorts.draw_independently(live, fraction)
            count = len(cohort)
        is_masked = self._context.uploads.is_masked
        if is_masked and plan.threshold is not None and 2 * plan.threshold <= len(cohort):
            raise RunError(
                f"--secagg-threshold {plan.threshold} is not more than half of the cohort of round {number} "
                f"({text.counted(len(cohort), 'store')}), so two halves could open two sums: use "
                f"{len(cohort) // 2 + 1} or more"
            )
        num_steps = plan.pacing.configured({name: num_train[name] for name in cohort})
        opened = OpenRound(
            key=key, cohort=cohort, live=live, wanted=count, num_steps=num_steps,
            pace=predicted(state.pace, num_steps), noise_key=new_key() if plan.noisy_mean else None,
            encryption=encryption, classes=state.classes,
        )  # fmt: skip
        self._ports.spool.clear()
        self._ports.checkpoints.save_open_round(opened)
        return opened

    def _warn_if_alone(self, number: int, live: tuple[str, ...], *, in_model: Collection[str]) -> None:
        """Warn once if the default quorum lets a run continue with the last live client.

        Not if the sums of others stay in the model (`in_model`).
        """
        is_alone = len(live) == 1 < self._most_live and self._plan.rounds.quorum is None and not {*in_model} - {*live}
        if is_alone and not self._was_alone:
            logger.warning(
                "round %d: rounds now count one store only, '%s', which alone is live: the model follows its photos. "
                "Start the others again; a run with --quorum 2 or more waits for them",
                number, live[0],
            )  # fmt: skip
        self._was_alone, self._most_live = is_alone, max(self._most_live, len(live))

    def _warn_if_fewer(self, number: int, live: tuple[str, ...]) -> None:
        """Warn if fewer stores are left than the configured quorum, which the others cannot meet any more."""
        quorum, out = self._plan.rounds.quorum or 0, self._membership.excluded()
        if len(live) < min(quorum, self._num_live):
            without = text.printable("; ".join(f"{name}: {reason}" for name, reason in sorted(out.items())))
            logger.warning(
                "round %d: rounds now count %s, fewer than --quorum %d: no others can take part%s",
                number, text.counted(len(live), "store"), quorum, f". Excluded: {without}" if without else "",
            )  # fmt: skip
        self._num_live = len(live)

    def _wait_for_clients(self, number: int, *, starts: bool) -> None:
        members, plan = self._membership, self._plan

        least = 1 if self._least == 1 else cohorts.population_for(self._least, fraction=plan.fraction)

        def needed() -> int:
            eligible = members.num_eligible(plan.start_clients)
            return plan.start_clients if starts else max(least, min(plan.rounds.quorum or 1, eligible))

        def is_over() -> bool:
            members.check_enough_left(least)
            return members.num_live() >= needed() and self._context.is_settled

        self._context.inbox.wait_for_returning()
        what = f"{text.counted(needed(), 'client')} for round {number}"
        self._context.inbox.wait(is_over, what, members.missing)

    def restore(self, progress: RoundProgress, key: TaskKey) -> None:
        """Note the uploads that a previous server process has spooled.

        Args:
            progress: updated with the replies.
            key: the round and attempt.
        """
        for name in self._ports.spool.names(key):  # uploads received before a server crash
            with suppress(RefusedError):  # its client is asked again
                upload = self._ports.spool.get(key, name)
                if name in progress.cohort and isinstance(upload, Upload):
                    self._note(progress, key, counted(name, upload), norm=self._validator.norm(upload))

    def collect(
        self, progress: RoundProgress, state: ServerState, key: TaskKey,
        delivery: Callable[[str], str] = lambda name: "",
    ) -> None:  # fmt: skip
        """Let the cohort train, and spool uploads until all have replied or the deadline has passed.

        Args:
            progress: updated with the replies.
            state: the state before the round.
            key: the round and attempt.
            delivery: makes what a client needs to mask its upload.
        """
        client_lr = self._plan.client_lr(key.round)
        added = auxiliary_vectors(self._algorithm.broadcast(state.model, self._layout.num_trainable))

        # Differential privacy assumes that nobody learns how many stores were drawn, but under masks.
        is_secret = self._plan.noisy_mean is not None and not self._context.uploads.is_masked
        quorum, clip_norm = None if is_secret else progress.needed, named_clip_norm(self._context, state)

        def broadcast(name: str) -> Broadcast:
            return Broadcast(
                key=key, purpose=Purpose.TRAIN, client_lr=client_lr, vectors={PARAMS: state.model.published, **added},
                counted=state.counted.get(name), num_steps=progress.assignment.steps_for(name), quorum=quorum,
                closed_form=self._context.closed_form, masking=delivery(name), clip_norm=clip_norm,
            )  # fmt: skip

        def on_reply(reply: Reply) -> None:
            member, norm = self._receive(reply, key, progress.assignment.share(reply.client), state)
            if member.status is ClientStatus.COUNTED:
                progress.record_pace(reply.client, self._timer.now())
            self._note(progress, key, member, reply, norm)
            if member.status is not ClientStatus.COUNTED:
                if isinstance(reply.message, Failure) and reply.message.refused:
                    self._membership.on_refused(reply.client, member.reason, doing=Purpose.TRAIN)
                will_repeat = isinstance(reply.message, Failure) and reply.message.will_repeat
                self._membership.on_failed(reply.client, member.reason, will_repeat=will_repeat)

        began = self._timer.now()
        grace = self._plan.rounds.rejoin_grace if self._membership.returning() else 0.0  # in a resumed round
        progress.patient_until = began + progress.assignment.patience + grace
        self._dispatcher.dispatch(
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

    def _receive(
        self, reply: Reply, key: TaskKey, share: float, state: ServerState
    ) -> tuple[Participation, float | None]:  # fmt: skip
        """Validate a reply to a training task, and spool a valid upload.

        An upload of which only `share` of the configured work was done is scaled to the full work.

        Returns:
            The client's part in the round, and the norm of a valid upload as it was sent.
        """

        name, members = reply.client, self._membership
        checked = partial(
            self._algorithm.checked, num_photos=members.num_train(name) + members.num_validation(name),
            num_counted=0 if self._context.closed_form else state.photos.get(name, 0),
        )  # fmt: skip
        found = self._validator.validate(reply, key, checked)
        if isinstance(found, Participation):
            return found, None
        self._noise.note(name, found.upload.mechanism, size=found.upload.num_examples)
        upload = normalized(found.upload, share, num_trainable=self._layout.num_trainable)
        self._ports.spool.put(key, reply.client, upload, source_of(reply, upload))
        return counted(reply.client, upload), found.norm

    def load(self, progress: RoundProgress, key: TaskKey) -> dict[str, Upload]:
        """Load the counted uploads from the spool, and bound the weights that they claim.

        Args:
            progress: the replies; updated with capped claims, and with uploads that can no longer be read.
            key: the round and attempt.

        Returns:
            By client, its upload.
        """
        uploads: dict[str, Upload] = {}
        for name in progress.counted():
            try:
                upload = self._ports.spool.get(key, name)
            except RefusedError as error:
                progress.refuse(name, str(error))
            else:
                if isinstance(upload, Upload):
                    uploads[name] = upload
        are_alike = self._plan.rounds.equal_weights and any(u.num_examples is None for u in uploads.values())
        if self._algorithm.sums or are_alike or self._context.uploads.summand is not None:
            return uploads
        claims = capped([upload.weight for upload in uploads.values()])
        for (name, upload), most in zip(tuple(uploads.items()), claims, strict=True):
            if most < upload.weight:
                uploads[name] = replace(upload, num_examples=most)
                claim = text.counted(upload.weight, "photo")
                reason = f"it claims {claim} and weighs as {most:,}, {TIMES_COUNT} times the median"
                progress.members[name] = replace(progress.members[name], num_examples=most, reason=reason)
        return uploads

    def fold(
        self, progress: RoundProgress, uploads: Mapping[str, Upload], state: ServerState, opened: OpenRound,
        masks: MaskedRound | EncryptedRound | None = None,
    ) -> tuple[ModelState, Mapping[str, Verdict]]:  # fmt: skip
        """Aggregate the uploads into a new model.

        Args:
            progress: the replies; updated with the next norm of uploads, if it adapts.
            uploads: by client.
            state: the state before the round.
            opened: the round.
            masks: those of the uploads, or their encryption.

        Returns:
            The model after the round, whose variances may be below zero, and the verdict on each upload.
        """
        names, noisy = sorted(uploads), self._plan.noisy_mean
        if (summand := self._context.uploads.summand) is not None:
            if isinstance(masks, EncryptedRound):
                aggregate, progress.train_loss = masks.aggregate(uploads)
                return self._algorithm.server_update(state.model, aggregate, len(opened.live)), {}
            named = named_clip_norm(self._context, state)
            aggregate, progress.train_loss, within = summed(self._context, summand, uploads, masks, named)
            if noisy is not None and masks is None:  # which fix whose uploads are added up
                self._ports.checkpoints.save_open_round(replace(opened, cohort=tuple(names)))
            aggregate = self._noised(aggregate, within, progress, state, opened)
            return self._algorithm.server_update(state.model, aggregate, len(opened.live)), {}
        alike = self._plan.rounds.equal_weights or noisy is not None
        clip_norm = 0.0 if noisy is None else state.clip_norm or noisy.clip_norm
        aggregator = self._context.aggregator
        if noisy is not None:
            aggregator = replace(aggregator, screens=(JointClip(clip_norm),))
        weights = {n: 1.0 if alike else self._algorithm.weight(uploads[n], staleness=0) for n in names}
        aggregate, found = combine(
            [uploads[name] for name in names], [weights[name] for name in names], aggregator,
            num_trainable=self._layout.num_trainable,
        ) if names else nothing(self._algorithm.vectors(self._layout), self._layout.num_trainable)  # fmt: skip
        verdicts = dict(zip(names, found, strict=True))
        kept = [name for name in names if not verdicts[name].left_out]
        length = weighted((progress.assignment.share(name), weights[name]) for name in kept) or 1.0
        aggregate = rescaled(aggregate, length)
        if noisy is not None:
            # A restarted server adds up the same uploads: with others, the round would be released twice.
            self._ports.checkpoints.save_open_round(replace(opened, cohort=tuple(names)))
            aggregate = self._noised(aggregate, Within.of(found), progress, state, opened)
        model = self._algorithm.server_update(state.model, aggregate, len(opened.live))
        return self._fused(model, (uploads[name].delta for name in kept), state, opened), verdicts

    def _fused(
        self, model: ModelState, deltas: Iterable[Tensor], state: ServerState, opened: OpenRound
    ) -> ModelState:  # fmt: skip
        """The model that the clients' models together teach, if the run does that."""
        fuse = self._context.model.fuse
        if fuse is None or self._context.closed_form:
            return model
        own = (state.model.published + delta for delta in deltas)
        rng = self._plan.rng.fork(round=opened.key.round, purpose="ensemble")
        return replace(model, params=fuse(own, model.params, rng))

    def _noised(
        self, aggregate: Aggregate, within: Within, progress: RoundProgress, state: ServerState, opened: OpenRound
    ) -> Aggregate:  # fmt: skip
        """The aggregate with noise, and divided by the expected number of uploads; as it is without --dp client."""
        noisy, uploads = self._plan.noisy_mean, self._context.uploads
        if noisy is None or opened.noise_key is None:
            return aggregate
        ball = None if uploads.summand is None else uploads.summand.ball(self._layout)
        expected = float(len(opened.cohort)) if uploads.is_masked else self._plan.fraction * len(opened.live)
        aggregate, progress.clip_norm = noisy.release(
            aggregate, within, expected=max(1.0, expected), clip_norm=state.clip_norm or noisy.clip_norm,
            key=opened.noise_key, inflation=1.0 if ball is None else ball.inflation,
        )  # fmt: skip
        return aggregate

    def choose(self, progress: RoundProgress, model: ModelState, key: TaskKey) -> ModelState:
        """Let the counted clients score the algorithm's candidates, if it has some, and return the state with the best.

        Args:
            progress: updated with what the stores are to evaluate.
            model: the state after `fold`.
            key: the round and attempt.
        """
        candidates = self._algorithm.candidates(model)
        if candidates is None:
            return model
        asked = self._evaluating(progress)
        vectors = {PARAMS: model.params, **auxiliary_vectors({CANDIDATES: candidates.values})}
        found: dict[str, Evaluation] = {}

        def broadcast(name: str) -> Broadcast:
            return Broadcast(
                key=key, purpose=Purpose.EVALUATE, client_lr=0.0, vectors=vectors,
                closed_form=self._context.closed_form,
            )  # fmt: skip

        def on_reply(reply: Reply) -> None:
            message, num_validation = reply.message, self._membership.num_validation(reply.client)
            problem = problem_with_evaluation(reply, key, num_validation)
            if isinstance(message, Evaluation) and not problem:
                problem = problem_with_scores(message, candidates)
            if problem or not isinstance(message, Evaluation):
                self._without_evaluation(reply.client, f"its scores of the candidates are not used: {problem}", reply)
            else:
                found[reply.client] = message

        codes = self._codes(num_scores=candidates.num_models * (1 + candidates.num_losses))
        if codes is not None and self._context.uploads.is_masked:
            total = MaskedEvaluation(self._context, progress, broadcast(""), codes).run(
                asked, self._patience, num_losses=candidates.num_losses
            )
            return self._chosen(progress, model, total)
        patience = self._patience(len(asked))

        def noted(reply: Reply) -> None:
            patience.on_reply()
            on_reply(reply)

        self._dispatcher.dispatch(
            asked, key, broadcast, noted, seconds=self._plan.rounds.timeout, traffic=progress, enough=patience.is_over
        )  # fmt: skip
        if not found:
            return model
        names = sorted(found)
        if codes is not None:
            evaluations = [found[name] for name in names]
            return self._chosen(progress, model, codes.summed(evaluations, num_losses=candidates.num_losses))
        counts = [self._membership.num_validation(name) for name in names]
        weights = [most / max(count, 1) for most, count in zip(capped(counts), counts, strict=True)]
        scores = summed_scores((found[name].candidates, weight) for name, weight in zip(names, weights, strict=True))
        num_photos = sum(weight * count for weight, count in zip(weights, counts, strict=True))
        model, progress.held_out = self._algorithm.choose(model, scores, num_photos)
        return model

    def _chosen(
        self, progress: RoundProgress, model: ModelState, total: SummedEvaluation | None
    ) -> ModelState:  # fmt: skip
        """The state with the candidate that the stores favor together."""
        if total is None or not total.num_scored:
            return model
        model, progress.held_out = self._algorithm.choose(model, total.candidates, total.num_scored)
        return model

    def _codes(self, *, num_scores: int = 0, tree: ProductTree | None = None) -> EvaluationCodes | None:
        """What the integers of an evaluation mean; None if the server uses those of each store."""
        summand = self._context.uploads.summand
        if summand is None:
            return None
        return EvaluationCodes.of(summand.codec.summands, num_scores=num_scores, tree=tree)

    def _evaluating(self, progress: RoundProgress) -> list[str]:
        """The counted clients that evaluate models. Of masked figures, the server does not know who has some."""
        if self._context.uploads.is_masked:
            return progress.counted()
        # After a restart in this phase, all uploads are there but no client is connected yet.
        returning = self._membership.returning()
        return [name for name in progress.counted() if self._membership.num_validation(name) or name in returning]

    def _patience(self, num_asked: int) -> Patience:
        grace = self._plan.rounds.rejoin_grace if self._membership.returning() else 0.0
        at_least = max(MIN_EVALUATION_SECONDS, grace)
        return Patience(num_asked, factor=EVALUATION_FACTOR, at_least=at_least, timer=self._timer)

    def quarantine(self, progress: RoundProgress, uploads: dict[str, Upload], problem: str, model: ModelState) -> bool:
        """Refuse the uploads that have destroyed the model, and exclude their clients for some rounds.

        Args:
            progress: the replies; updated with the refused clients.
            uploads: by client; those refused are removed.
            problem: what is wrong with the model.
            model: the model before the round.

        Returns:
            Whether any upload is at fault, or stands out.
        """
        names = sorted(uploads)
        found = self._algorithm.at_fault(model, uploads) or outliers(
            [uploads[name] for name in names], names, self._layout.num_trainable
        )
        for name, why in found.items():
            reason = f"the model is destroyed ({problem}), and {why}"
            del uploads[name]
            progress.refuse(name, reason)
            self._membership.suspend(name, reason)
        return bool(found)

    def advance(
        self,
        progress: RoundProgress,
        state: ServerState,
        model: ModelState,
        verdicts: Mapping[str, Verdict],
        key: TaskKey,
    ) -> ServerState:
        """The state after the round.

        Clients that the aggregator leaves out are refused, so that they roll back their state: their update is not
        in the model.

        Args:
            progress: the replies; updated with refused clients.
            state: the state before the round.
            model: the model after the round.
            verdicts: the verdict on each upload.
            key: the round and attempt.
        """
        for name in progress.counted():
            progress.members[name] = _judged(progress.members[name], verdicts.get(name, Verdict()))
            self._membership.on_succeeded(name)
        model = replace(model, params=self._layout.clamp(model.params))
        photos = {name: self._num_photos(progress, name) for name in progress.counted()}
        return replace(
            state,
            round=key.round,
            clip_norm=progress.clip_norm,
            model=self._downloads.advance(self._averaged(model, key.round), key.round),
            counted={**state.counted, **dict.fromkeys(progress.counted(), key)},
            photos={**state.photos, **photos}
            if self._algorithm.counts_photos and not self._context.closed_form
            else state.photos,
        )

    def _num_photos(self, progress: RoundProgress, name: str) -> int:
        """The photos that a client's sums are of; known roughly where they arrive as a part of one sum."""
        if self._context.uploads.summand is None:
            return progress.members[name].num_examples or 0
        joined_with = self._membership.num_train(name) + self._membership.num_validation(name)
        return 0 if self._membership.withdraws(name) else max(1, joined_with)

    def _averaged(self, model: ModelState, round: int) -> ModelState:
        """Average the models of the last rounds, if so configured."""
        if self._context.closed_form:
            return model
        plan = self._plan
        return with_mean(model, round=round, num_rounds=plan.num_rounds, last=plan.average_rounds)

    def evaluate(self, progress: RoundProgress, state: ServerState, key: TaskKey) -> None:
        """Let the counted clients evaluate the new model on their own validation photos, which it has not seen.

        If the round may be the last, they count by product, too.

        Args:
            progress: updated with the evaluations.
            state: the state after the round.
            key: the round and attempt.
        """
        if not self._plan.evaluates:
            return
        asked = self._evaluating(progress)

        def broadcast(name: str) -> Broadcast:
            return Broadcast(
                key=key, purpose=Purpose.EVALUATE, client_lr=0.0, vectors={PARAMS: values},
                per_product=tree is not None,
            )  # fmt: skip

        values = state.model.published if progress.held_out is None else progress.held_out
        tree = self._context.catalogue.tree if self._context.is_last(key.round, state.best) else None
        codes = self._codes(tree=tree)
        if codes is not None and self._context.uploads.is_masked:
            task = broadcast("")
            progress.summed = MaskedEvaluation(self._context, progress, task, codes).run(asked, self._patience)
            return
        patience, silent = self._patience(len(asked)), set(asked)

        def on_reply(reply: Reply) -> None:
            patience.on_reply()
            silent.discard(reply.client)
            problem = problem_with_evaluation(reply, key, self._membership.num_validation(reply.client), tree)
            if problem:
                self._without_evaluation(reply.client, f"its evaluation is not used: {problem}", reply)
                return
            self._membership.on_succeeded(reply.client, doing=Purpose.EVALUATE)
            if isinstance(reply.message, Evaluation) and reply.message.num_examples:
                count = reply.message.num_examples
                accuracy = reply.message.num_correct / count
                progress.members[reply.client] = replace(progress.members[reply.client], accuracy=accuracy)
                progress.evaluated[reply.client] = min(count, self._plan.rounds.max_examples)
                if reply.message.loss_sum is not None:
                    progress.losses[reply.client] = reply.message.loss_sum / count
                progress.evaluations[reply.client] = reply.message

        began = self._timer.now()
        self._dispatcher.dispatch(
            asked, key, broadcast, on_reply, seconds=self._plan.rounds.timeout, traffic=progress,
            enough=patience.is_over,
        )  # fmt: skip
        for name in sorted(silent):
            if self._membership.address(name) is not None:
                self._without_evaluation(name, f"no evaluation within {self._timer.now() - began:.4g} s")
        if codes is not None:
            progress.summed = codes.summed(progress.evaluations.values())
        for name, most in zip(progress.evaluated, capped(list(progress.evaluated.values())), strict=True):
            progress.evaluated[name] = most

    def _without_evaluation(self, name: str, reason: str, reply: Reply | None = None) -> None:
        if reply is not None and isinstance(reply.message, Failure) and reply.message.refused:
            self._membership.on_refused(name, reason, doing=Purpose.EVALUATE)
            return
        self._ports.sink.emit(ClientRefused(client=name, reason=reason))
        will_repeat = reply is not None and isinstance(reply.message, Failure) and reply.message.will_repeat
        self._membership.on_failed(name, reason, doing=Purpose.EVALUATE, will_repeat=will_repeat)

    def _note(
        self, progress: RoundProgress, key: TaskKey, member: Participation, reply: Reply | None = None,
        norm: float | None = None,
    ) -> None:  # fmt: skip
        progress.members[member.client] = member
        source = reply.source if reply else None
        self._ports.sink.emit(
            UploadReceived(
                round=key.round, client=member.client, status=member.status, reason=member.reason,
                num_done=len(progress.members), num_cohort=len(progress.cohort),
                num_bytes=reply.num_bytes if reply else 0, digest=source.digest if source else "", norm=norm,
            )
        )  # fmt: skip


def _judged(member: Participation, verdict: Verdict) -> Participation:
    status = ClientStatus.REFUSED if verdict.left_out else member.status
    return replace(member, status=status, reason="; ".join(filter(None, (member.reason, verdict.reason))))
