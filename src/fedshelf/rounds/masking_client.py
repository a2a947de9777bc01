"""A client whose uploads are masked: the stages of secure aggregation around training.

    MaskingRequest ─▶ stages A, B, D and E of `privacy.secure_aggregation`
    Broadcast      ─▶ stage C: take the shares, train, mask the upload

The secrets of a round are in this process only. A client that has restarted since refuses, and the round does without
it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fedshelf.compression.download import name_of
from fedshelf.compression.sum_stage import EncodeSummand
from fedshelf.core.errors import FedShelfError, PolicyError, RefusedError
from fedshelf.core.messages import (
    Broadcast,
    ClientMessage,
    EncryptionRequest,
    Failure,
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
from fedshelf.identity.keys import KeyPair
from fedshelf.privacy.secure_aggregation import wire
from fedshelf.privacy.secure_aggregation.client import ClientRound
from fedshelf.privacy.secure_aggregation.context import LEAST_MEMBERS, RoundContext
from fedshelf.privacy.secure_aggregation.keys import Identities, RoundRoster
from fedshelf.privacy.secure_aggregation.shares import SealedSharesDelivery
from fedshelf.privacy.secure_aggregation.survivors import Survivors
from fedshelf.privacy.secure_aggregation.unmasking import OpenedSumStore, Signatures
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
    """

    run_id: str
    config: str
    threshold: int | None
    encode: EncodeSummand
    layout: Layout


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
        self._round: tuple[RoundContext, ClientRound] | None = None
        self._masked: Upload | None = None  # of that round

    def before(self, message: ServerMessage) -> ClientMessage | None:
        """Answer a message, if it is one of the exchange, or a rule does not allow it; None: it is for the client."""
        if isinstance(message, Setup | EncryptionRequest):
            return None
        try:
            if isinstance(message, MaskingRequest):
                return self._reply_to(message)
            if message.purpose is Purpose.TRAIN and self._terms() is not None:
                return self._receive(message)
        except FedShelfError as error:
            return Failure(key=message.key, reason=str(error), refused=isinstance(error, PolicyError))
        return None

    def after(self, message: ServerMessage, reply: ClientMessage) -> ClientMessage:
        """Mask the client's reply to a message, if it is an upload of a masked run."""
        terms = self._terms() if isinstance(message, Broadcast) and isinstance(reply, Upload) else None
        if terms is None or not isinstance(message, Broadcast) or not isinstance(reply, Upload):
            return reply
        try:
            codes = tuple(part.copy() for part in terms.encode.codes(reply, terms.layout))
            masked = self._current(message.key).mask(codes, task_digest(message))
        except FedShelfError as error:
            return Failure(key=message.key, reason=str(error))
        self._masked = terms.encode.with_codes(reply, masked.vectors)
        return self._masked

    def _reply_to(self, request: MaskingRequest) -> MaskingReply:
        terms, text = self._terms(), request.content
        if terms is None:
            raise RefusedError("this run's uploads are not masked")
        if request.stage is MaskingStage.KEYS:
            content: object = self._show_keys(terms, request.key, wire.from_text(text, RoundContext))
        elif request.stage is MaskingStage.SHARES:
            content = self._current(request.key).deal(wire.from_text(text, RoundRoster))
        elif request.stage is MaskingStage.SURVIVORS:
            content = self._current(request.key).confirm(wire.from_text(text, Survivors))
        else:
            content = self._current(request.key).reveal(wire.from_text(text, Signatures))
        return MaskingReply(key=request.key, stage=request.stage, content=wire.to_text(content))

    def _show_keys(self, terms: MaskingTerms, key: TaskKey, context: RoundContext) -> object:
        sizes = terms.encode.grid(terms.layout).sizes
        context.check(run_id=terms.run_id, config=terms.config, sizes=sizes, threshold=terms.threshold)
        if context.key != key:
            raise RefusedError("the keys are asked for another task than the message is for")
        if self._round is None or self._round[0] != context:
            if self._round is not None and self._round[0].key == key:
                raise RefusedError("this client has shown keys for this attempt, of another model")
            self._masked = None
            self._round = context, ClientRound(
                self._member(), context, opened_sums=self._opened_sums, identity=self._identity(),
                identities=self._identities(), min_cohort=self._min_cohort,
            )  # fmt: skip
        return self._round[1].advertisement

    def _current(self, key: TaskKey) -> ClientRound:
        if self._round is None or self._round[0].key != key:
            raise RefusedError("this client has no keys for this round: it was restarted, or joined later")
        return self._round[1]

    def _receive(self, broadcast: Broadcast) -> Upload | None:
        if not broadcast.masking:
            raise RefusedError("this run's uploads are masked, and the task comes without the shares for that")
        masks = self._current(broadcast.key)
        masks.receive(wire.from_text(broadcast.masking, SealedSharesDelivery))
        return self._masked  # asked for again


def task_digest(broadcast: Broadcast) -> str:
    """Identifies what a training starts from: the model, which all clients decode bit for bit, the algorithm's vectors,
    and the learning rate."""
    vectors = blob.write(dict(broadcast.auxiliary)).digest if broadcast.auxiliary else ""
    return f"{broadcast.model or name_of(broadcast.params)} {vectors} {broadcast.client_lr!r} {broadcast.num_steps}"
