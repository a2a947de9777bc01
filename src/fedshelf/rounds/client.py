"""The client's side of the federation: how a store answers each message."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedshelf.algorithms.base import Algorithm
from fedshelf.compression.download import HeldModel, MemoryHeldModel, open_broadcast
from fedshelf.core.bounds import MAX_FLOAT
from fedshelf.core.errors import FedShelfError, PolicyError, RefusedError
from fedshelf.core.messages import (
    Broadcast,
    ClientMessage,
    Comparison,
    EncryptionRequest,
    Evaluation,
    Failure,
    MaskingRequest,
    Mechanism,
    Purpose,
    Ready,
    ServerMessage,
    Setup,
    TaskKey,
    Upload,
    task_key,
)
from fedshelf.core.ports import ClientStates, ReleaseTerms
from fedshelf.core.state import ClientState
from fedshelf.core.text import counted
from fedshelf.data.catalogue import Catalogue
from fedshelf.personalization.base import NONE, Personalization
from fedshelf.personalization.model_selection import ModelSelection, compare
from fedshelf.privacy.accounting import as_json
from fedshelf.privacy.client_dp import ClippedAtClient
from fedshelf.privacy.withholding import WITHOUT_NOISE, only_noised
from fedshelf.rounds.growth import grown_client
from fedshelf.rounds.pipeline import UploadPipeline
from fedshelf.rounds.product_report import counts_of
from fedshelf.rounds.validation import check_broadcast
from fedshelf.training.trainer import Trainer

logger = logging.getLogger(__name__)
NOTHING = Mechanism(noise_multiplier=0.0, sampling_rate=0.0, steps=1)
"""The mechanism of a reply in which no photo has a part."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What a client builds from a `Setup`.

    Attributes:
        algorithm: the algorithm, of which the client runs its half.
        trainer: trains the bound model on the client's photos.
        ready: the reply to the setup.
        model_selection: chooses the store's model after the last round.
        closed_form: computes the output layer in closed form, if the run does that before or after its rounds.
        uploads: the stages that uploads pass.
        personalization: the part of the model that stays at the client.
        catalogue: the classes; None: the client does not count by product.
        mechanism: the noise in uploads; None: there is none.
        local_trainer: trains without noise what stays in the store; None: the trainer does that, too.
        is_masked: whether uploads and evaluations are masked. A comparison is not, and stays in the store.
        clip: scales uploads down to the norm that a task names; None: the client does not.
    """

    algorithm: Algorithm
    trainer: Trainer
    ready: Ready
    model_selection: ModelSelection
    closed_form: Algorithm | None = None
    uploads: UploadPipeline = field(default_factory=UploadPipeline)
    personalization: Personalization = NONE
    catalogue: Catalogue | None = None
    mechanism: Mechanism | None = None
    local_trainer: Trainer | None = None
    is_masked: bool = False
    clip: ClippedAtClient | None = None

    @property
    def adds_noise(self) -> bool:
        """Whether this store adds noise to its uploads, so that nothing else may be computed from photos and sent."""
        return self.mechanism is not None or (self.clip is not None and self.clip.noise_at == "stores")

    @property
    def withholds_comparison(self) -> bool:
        """Whether no figures of a comparison are sent: they have no noise, or would tell of this store alone."""
        return self.is_masked or self.adds_noise

    @property
    def closed_form_uploads(self) -> UploadPipeline:
        """The stages that uploads of `closed_form` pass."""
        if self.closed_form is None:
            raise RefusedError("this run has no closed form to compute: neither --warm-start nor --refit-head")
        return self.uploads.of(self.closed_form, self.trainer.bound_model.params.layout)

    def grown(self, state: ClientState) -> ClientState:
        """A state of this client, for the model of the current catalogue."""
        return grown_client(state, self.trainer, self.algorithm, self.personalization)

    def terms(self, terms: ReleaseTerms, reply: ClientMessage, epsilon: float | None) -> ReleaseTerms:
        """The terms of a reply.

        Args:
            terms: its purpose.
            reply: the reply. One that is kept may have been made under another setup, with other noise or none.
            epsilon: the store's privacy loss with it.
        """
        if isinstance(reply, Comparison) and self.mechanism is not None:
            return replace(terms, mechanism=as_json(NOTHING))
        if isinstance(reply, Evaluation) and self.is_masked:
            return replace(terms, protections=self.uploads.masks)
        if isinstance(reply, Upload) and terms.purpose != Purpose.TRAIN:
            return replace(terms, protections=self.closed_form_uploads.protections)
        if not isinstance(reply, Upload):
            return terms
        noise, clip = reply.mechanism, () if self.clip is None else self.clip.protections
        if noise is None:
            return replace(terms, protections=(*clip, *self.uploads.protections))
        said = f"noise {noise.noise_multiplier:.3g} in {counted(noise.steps, 'step')}"
        return replace(
            terms, protections=(said, *self.uploads.protections), mechanism=as_json(noise), epsilon=epsilon
        )  # fmt: skip


class Client:
    """Answers the server's messages, one at a time.

    Args:
        prepare: builds the work for a setup.
        states: the client's state between rounds.
        held: stores the last decoded model, as the base of the next difference.
        on_model: called with each model to train or evaluate.
        accept: called with each task, its model decoded, before anything is computed; refuses what the store does not
            allow by a `PolicyError`.
        on_reply: called with each reply before it is handed over to be sent.
        charge: called before a training whose upload has noise; returns the store's privacy loss with it, or refuses it
            by a `PolicyError`. None: the loss is not known.
        withhold: removes from a reply what the store does not tell.
        renew: called before each training task, with the work; returns the work with the photos to train on.
    """

    def __init__(
        self, *, prepare: Callable[[Setup], Work], states: ClientStates, held: HeldModel | None = None,
        on_model: Callable[[Broadcast], None] = lambda broadcast: None,
        accept: Callable[[Broadcast, Trainer], None] = lambda broadcast, trainer: None,
        on_reply: Callable[[ClientMessage, ReleaseTerms], None] = lambda reply, terms: None,
        charge: Callable[[Mechanism], float | None] = lambda mechanism: None,
        withhold: Callable[[ClientMessage], ClientMessage] = lambda reply: reply,
        renew: Callable[[Broadcast, Work], Work] = lambda broadcast, work: work,
    ) -> None:  # fmt: skip
        self._prepare = prepare
        self._on_reply = on_reply
        self._charge = charge
        self._epsilon: float | None = None  # of the current task
        self._on_model = on_model
        self._accept = accept
        self._withhold = withhold
        self._renew = renew
        self._states = states
        self._held: HeldModel = MemoryHeldModel() if held is None else held
        self._setup: Setup | None = None
        self._work: Work | None = None
        self._compared: Comparison | None = None

    def handle(self, message: ServerMessage) -> ClientMessage:
        """Do what `message` asks and return the reply. Expected errors become replies, too."""
        terms, self._epsilon = ReleaseTerms(purpose=_purpose(message)), None
        reply: ClientMessage
        try:
            if isinstance(message, MaskingRequest | EncryptionRequest):
                raise RefusedError("this run's uploads are neither masked nor encrypted")
            whole = self._set_up(message) if isinstance(message, Setup) else self._take_part(message)
            terms = terms if self._work is None else self._work.terms(terms, whole, self._epsilon)
            reply = self._withhold(whole)
        except FedShelfError as error:
            reply = Failure(
                key=task_key(message), reason=str(error), will_repeat=error.will_repeat,
                refused=isinstance(error, PolicyError),
            )  # fmt: skip
        self._on_reply(reply, terms)
        return reply

    def _set_up(self, setup: Setup) -> Ready:
        if self._work is None or setup != self._setup:
            # If this setup fails, no task of an earlier one is done with half of its objects.
            self._work, self._compared = None, None
            self._work, self._setup = self._prepare(setup), setup
        known = self._held.load()
        return replace(self._work.ready, holds=known[0] if known else "")

    def _take_part(self, task: Broadcast) -> ClientMessage:
        if self._work is None or task.key.run_id != self._work.ready.run_id:
            return Failure(key=task.key, reason=f"run {task.key.run_id} was never set up at this client")
        work = self._work
        layout = work.trainer.bound_model.params.layout
        broadcast = open_broadcast(task, self._held, layout)
        check_broadcast(broadcast, layout)
        if work.mechanism is not None and broadcast.num_steps is not None:
            raise RefusedError("the noise is calibrated to the configured epochs, and the task has steps of its own")
        if broadcast.purpose is Purpose.TRAIN:
            work = self._work = self._renew(broadcast, work)
        self._accept(broadcast, work.trainer)
        if broadcast.purpose is Purpose.COMPARE:
            return self._compare(work, broadcast)
        before = work  # of rounds in steps, whose algorithm keeps its state
        if broadcast.closed_form:
            uploads = work.closed_form_uploads
            work = replace(work, algorithm=work.closed_form or work.algorithm, uploads=uploads)
        self._on_model(broadcast)
        if broadcast.purpose is Purpose.EVALUATE:
            if (work.adds_noise or work.uploads.is_encrypted) and WITHOUT_NOISE[Evaluation] is None:
                raise RefusedError("figures on validation photos have no noise")
            work.trainer.bound_model.load(broadcast.params)
            work.personalization.apply(
                work.trainer.bound_model, work.grown(self._states.peek(broadcast.counted or broadcast.key))
            )
            score = work.trainer.evaluate()
            scores = work.algorithm.score_candidates(broadcast, work.trainer) if broadcast.auxiliary else ()
            wanted = work.catalogue if broadcast.per_product else None
            products, levels = counts_of(score.confusion, wanted.tree) if wanted else ((), ())
            return Evaluation(
                key=broadcast.key, num_examples=score.num_examples, num_correct=score.num_correct,
                loss_sum=score.loss_sum if score.loss_sum <= MAX_FLOAT else MAX_FLOAT,  # also of NaN
                candidates=scores, products=products, levels=levels,
            )  # fmt: skip
        # The server commits changes only with a counted round; roll back all others.
        state = before.grown(self._states.commit_or_rollback(broadcast))
        cached_reply = self._states.cached_reply(broadcast.key)
        if cached_reply is not None:
            return cached_reply  # a restarted server asks again, and gets the same bytes
        work.personalization.apply(work.trainer.bound_model, state)
        if work.mechanism is not None:
            self._epsilon = self._charge(work.mechanism)
        if broadcast.closed_form:  # the run's algorithm keeps its state
            upload, _ = work.algorithm.client_round(replace(broadcast, counted=None), ClientState(), work.trainer)
            after = state
        else:
            upload, after = work.algorithm.client_round(broadcast, state, work.trainer)
            if work.mechanism is not None:
                upload = only_noised(replace(upload, mechanism=work.mechanism))
            if work.clip is not None:
                upload = work.clip.apply(upload, broadcast.clip_norm)
        after = work.personalization.update_state(broadcast, state, after, work.trainer)
        told = self._withhold(upload)  # before it is encoded: a sum has what the store tells, and no more
        upload = replace(told, mechanism=upload.mechanism) if isinstance(told, Upload) else upload
        sealed, after = work.uploads.seal(
            upload, client=work.trainer.client, before=state, after=after, layout=layout
        )  # fmt: skip
        self._states.stage(broadcast.key, sealed, replace(after, num_classes=work.trainer.num_classes or 0))
        return sealed

    def load_own(self, key: TaskKey, shared: Tensor) -> None:
        """Load the shared values of a model and apply this client's personalization.

        Args:
            key: the task that the model came with.
            shared: the model [S].
        """
        if self._work is not None:
            bound_model = self._work.trainer.bound_model
            bound_model.load(shared)
            self._work.personalization.apply(bound_model, self._work.grown(self._states.peek(key)))

    def _compare(self, work: Work, broadcast: Broadcast) -> Comparison:
        """Cache the comparison, which takes as long as all rounds, so that a restarted server gets the same reply."""
        if self._compared is not None and self._compared.key == broadcast.key:
            return self._compared
        told = Comparison(key=broadcast.key, best=None, accuracies={}, on_test=False, num_validation=None)
        try:
            state = work.grown(self._states.commit_or_rollback(broadcast))
            told = compare(
                broadcast, state, trainer=work.local_trainer or work.trainer,
                personalization=work.personalization, model_selection=work.model_selection,
            )  # fmt: skip
        except FedShelfError as error:
            if not work.withholds_comparison:
                raise
            logger.warning("no model was chosen: %s", error)  # which is not told either
        self._compared = only_noised(told) if work.withholds_comparison else told
        return self._compared


def _purpose(message: ServerMessage) -> str:
    if isinstance(message, Setup):
        return "setup"
    if isinstance(message, MaskingRequest | EncryptionRequest):
        return Purpose.TRAIN.value
    return "closed-form" if message.closed_form else message.purpose.value
