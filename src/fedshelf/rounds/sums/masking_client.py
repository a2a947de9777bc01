"""A client whose uploads and evaluations are masked: the stages of secure aggregation around the computation.

    MaskingRequest ─▶ stages A, B, D and E of `privacy.secure_aggregation`
    Broadcast      ─▶ stage C: take the shares, train or evaluate, mask the reply

A round has up to three sums (`MaskedPurpose`), each with keys of its own: of uploads, of scores of candidates, and of
evaluations. The secrets of a round are in this process only. A client that has restarted since refuses, and the round
does without it.
"""

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedshelf.compression.download import name_of
from fedshelf.compression.sum_stage import EncodeSummand
from fedshelf.core.errors import FedShelfError, PolicyError, RefusedError
from fedshelf.core.messages import (
    Broadcast,
    ClientMessage,
    EncryptionRequest,
    Evaluation,
    Failure,
    MaskedPurpose,
    MaskingReply,
    MaskingRequest,
    MaskingStage,
    Purpose,
    ServerMessage,
    Setup,
    TaskKey,
    Upload,
)
from fedshelf.core.params import Layout
from fedshelf.data.product_tree import ProductTree
from fedshelf.identity.keys import KeyPair
from fedshelf.privacy.distributed_dp import NoiseShares
from fedshelf.privacy.secure_aggregation import wire
from fedshelf.privacy.secure_aggregation.client import ClientRound
from fedshelf.privacy.secure_aggregation.context import LEAST_MEMBERS, RoundContext
from fedshelf.privacy.secure_aggregation.keys import Identities, RoundRoster
from fedshelf.privacy.secure_aggregation.masks import Integers
from fedshelf.privacy.secure_aggregation.shares import SealedSharesDelivery
from fedshelf.privacy.secure_aggregation.survivors import Survivors
from fedshelf.privacy.secure_aggregation.unmasking import OpenedSumStore, Signatures
from fedshelf.rounds.sums.evaluations import BITS, EvaluationCodes
from fedshelf.serialization import blob


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskingTerms:
    """What a client knows of the masks of its run.

    Attributes:
        run_id: the run.
        config: digest of its configuration.
        threshold: that of the configuration.
        encode: encodes uploads for a sum.
        layout: the model's layout.
        tree: the product tree.
        closed_form: encodes sums over photos before or after the rounds, if the run has such; None if not.
        sends_sums: whether all uploads are exact sums over photos.
        noise: the store's share of the noise, which is added before the masks; None: it adds none.
    """

    run_id: str
    config: str
    threshold: int | None
    encode: EncodeSummand
    layout: Layout
    tree: ProductTree
    closed_form: EncodeSummand | None = None
    sends_sums: bool = False

    def encodes(self, purpose: MaskedPurpose) -> EncodeSummand:
        """What encodes uploads.

        Raises:
            RefusedError: the run has no such uploads.
        """
        found = self.closed_form if purpose is MaskedPurpose.CLOSED_FORM else self.encode
        if found is None:
            raise RefusedError("this run has no closed form to compute: neither --warm-start nor --refit-head")
        return found

    noise: NoiseShares | None = None


class MaskingClient:
    """Masks what a client sends: call `before`, the client itself unless that has answered, and `after`.

    Args:
        member: returns the client's name.
        terms: returns the terms of the current run; None if its uploads are not masked.
        opened_sums: the client's record of the sums that it helps to open.
        identity: returns the key that signs; None: nothing is signed.
        identities: returns all stores' identity keys; None: the server is believed to name real stores.
        min_cohort: how many members a sum has at least.
    """

    def __init__(
        self, member: Callable[[], str], *, terms: Callable[[], MaskingTerms | None], opened_sums: OpenedSumStore,
        identity: Callable[[], KeyPair | None] = lambda: None,
        identities: Callable[[], Identities | None] = lambda: None, min_cohort: int = LEAST_MEMBERS,
    ) -> None:  # fmt: skip
        self._member = member
        self._terms = terms
        self._opened_sums = opened_sums
        self._identity = identity
        self._identities = identities
        self._min_cohort = max(min_cohort, LEAST_MEMBERS)
        self._rounds: dict[MaskedPurpose, tuple[RoundContext, ClientRound]] = {}
        self._masked: dict[MaskedPurpose, Upload | Evaluation] = {}  # of these rounds

    def before(self, message: ServerMessage) -> ClientMessage | None:
        """Answer a message, if it is one of the exchange, or a rule does not allow it; None: it is for the client."""
        if isinstance(message, Setup | EncryptionRequest):
            return None
        try:
            if isinstance(message, MaskingRequest):
                return self._reply_to(message)
            if message.purpose is not Purpose.COMPARE and (terms := self._terms()) is not None:
                return self._receive(message, sends_sums=terms.sends_sums)
        except FedShelfError as error:
            return Failure(key=message.key, reason=str(error), refused=isinstance(error, PolicyError))
        return None

    def after(self, message: ServerMessage, reply: ClientMessage) -> ClientMessage:
        """Mask the client's reply to a message, if it is an upload or an evaluation of a masked run."""
        terms = self._terms()
        if terms is None or not isinstance(message, Broadcast) or not isinstance(reply, Upload | Evaluation):
            return reply
        purpose = message.masked_purpose
        try:
            if isinstance(reply, Upload):
                encode = terms.encodes(purpose)
                codes = tuple(part.copy() for part in encode.codes(reply, terms.layout))
                masks, ball = self._current(message.key, purpose), encode.ball(terms.layout)
                if terms.noise is not None and ball is not None:
                    terms.noise.add(codes, ball, num_members=masks.num_members, threshold=masks.threshold)
                masked: Upload | Evaluation = encode.with_codes(reply, self._mask(message, codes))
            else:
                figures = self._evaluation_codes(terms, message).encode(reply)
                masked = masked_evaluation(reply.key, self._mask(message, (figures,))[0])
        except FedShelfError as error:
            return Failure(key=message.key, reason=str(error))
        self._masked[purpose] = masked
        return masked

    def _mask(self, message: Broadcast, codes: tuple[Integers, ...]) -> tuple[Integers, ...]:
        return self._current(message.key, message.masked_purpose).mask(codes, task_digest(message)).vectors

    def _evaluation_codes(self, terms: MaskingTerms, message: Broadcast) -> EvaluationCodes:
        summands = terms.encode.codec.summands
        if message.masked_purpose is MaskedPurpose.CHOOSE:
            [(_, size)] = self._rounds[MaskedPurpose.CHOOSE][0].sizes
            return EvaluationCodes.scoring(summands, size)
        return EvaluationCodes.of(summands, tree=terms.tree if message.per_product else None)

    def _reply_to(self, request: MaskingRequest) -> MaskingReply:
        terms, text = self._terms(), request.content
        if terms is None:
            raise RefusedError("this run's uploads are not masked")
        if request.stage is MaskingStage.KEYS:
            content: object = self._show_keys(terms, request, wire.from_text(text, RoundContext))
        elif request.stage is MaskingStage.SHARES:
            content = self._current(request.key, request.purpose).deal(wire.from_common_text(text, RoundRoster))
        elif request.stage is MaskingStage.SURVIVORS:
            content = self._current(request.key, request.purpose).confirm(wire.from_common_text(text, Survivors))
        else:
            content = self._current(request.key, request.purpose).reveal(wire.from_common_text(text, Signatures))
        return MaskingReply(
            key=request.key, stage=request.stage, content=wire.to_text(content), purpose=request.purpose
        )  # fmt: skip

    def _show_keys(self, terms: MaskingTerms, request: MaskingRequest, context: RoundContext) -> object:
        purpose, known = request.purpose, self._rounds.get(request.purpose)
        sizes = context.sizes  # of an evaluation, checked when its figures are masked
        if purpose in (MaskedPurpose.TRAIN, MaskedPurpose.CLOSED_FORM):
            sizes = terms.encodes(purpose).grid(terms.layout).sizes
        elif [bits for bits, _ in sizes] != [BITS]:
            raise RefusedError(f"figures are one vector of integers of {BITS} bits, and the server asks for {sizes}")
        context.check(run_id=terms.run_id, config=terms.config, sizes=sizes, threshold=terms.threshold)
        if (context.key, context.purpose) != (request.key, purpose):
            raise RefusedError("the keys are asked for another task than the message is for")
        if known is None or known[0] != context:
            if known is not None and known[0].key == request.key:
                raise RefusedError("this client has shown keys for this attempt, of another model")
            self._masked.pop(purpose, None)
            self._rounds[purpose] = known = context, ClientRound(
                self._member(), context, opened_sums=self._opened_sums, identity=self._identity(),
                identities=self._identities(), min_cohort=self._min_cohort,
            )  # fmt: skip
        return known[1].advertisement

    def _current(self, key: TaskKey, purpose: MaskedPurpose) -> ClientRound:
        known = self._rounds.get(purpose)
        if known is None or known[0].key != key:
            raise RefusedError("this client has no keys for this round: it was restarted, or joined later")
        return known[1]

    def _receive(self, broadcast: Broadcast, *, sends_sums: bool) -> Upload | Evaluation | None:
        if not broadcast.masking:
            raise RefusedError("this run's uploads are masked, and the task comes without the shares for that")
        if sends_sums and broadcast.purpose is Purpose.TRAIN and broadcast.counted is not None:
            raise RefusedError(
                "sums over photos are masked once: a sum of what has changed since is that of the one store whose "
                "photos have"
            )
        purpose = broadcast.masked_purpose
        masks = self._current(broadcast.key, purpose)
        masks.receive(wire.from_text(broadcast.masking, SealedSharesDelivery))
        return self._masked.get(purpose)  # asked for again


def masked_evaluation(key: TaskKey, codes: Integers) -> Evaluation:
    """An evaluation with these integers alone."""
    text = base64.b64encode(codes.tobytes()).decode()
    return Evaluation(key=key, num_examples=0, num_correct=0, loss_sum=None, masked=text)


def codes_of(evaluation: Evaluation, size: int) -> Integers:
    """The integers [size] of a masked evaluation.

    Raises:
        RefusedError: it does not hold that many.
    """
    try:
        content = base64.b64decode(evaluation.masked, validate=True)
    except binascii.Error:
        content = b""
    if len(content) != size * BITS // 8:
        raise RefusedError(f"it has masked figures of {len(content):,} bytes, and not {size * BITS // 8:,}")
    return np.frombuffer(content, f"<u{BITS // 8}")


def task_digest(broadcast: Broadcast) -> str:
    """Identifies what a training or an evaluation starts from: the model, which all clients decode bit for bit, the
    algorithm's vectors or candidates, the learning rate, and the norm of uploads."""
    vectors = blob.write(dict(broadcast.auxiliary)).digest if broadcast.auxiliary else ""
    start = f"{broadcast.model or name_of(broadcast.params)} {vectors} {broadcast.client_lr!r} {broadcast.num_steps}"
    return start if broadcast.clip_norm is None else f"{start} {broadcast.clip_norm!r}"
