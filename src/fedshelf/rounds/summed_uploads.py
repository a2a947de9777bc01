"""Rounds whose uploads are integers that the server adds up, under masks or not.

    draw ─▶ A keys ─▶ B shares ─▶ C train, masked uploads ─▶ sum ─▶ D survivors ─▶ E unmasking ─▶ decode ─▶ aggregate

Without masks, only training, sum and decode are left: the sum is the same in every bit. The set of survivors is saved
before the first of them is told, with the uploads in the spool: a restarted server opens the same sum or none.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedshelf.algorithms.base import Aggregate
from fedshelf.compression.sum_stage import EncodeSummand
from fedshelf.compression.upload_grid import Integers
from fedshelf.core.errors import RefusedError, RunError
from fedshelf.core.events import ClientStatus, Participation
from fedshelf.core.messages import (
    AUXILIARY,
    DELTA,
    PARAMS,
    Broadcast,
    Failure,
    MaskingReply,
    MaskingRequest,
    MaskingStage,
    Purpose,
    Upload,
    auxiliary_vectors,
)
from fedshelf.core.ports import Reply
from fedshelf.core.state import OpenRound, ServerState
from fedshelf.core.text import counted
from fedshelf.privacy.secure_aggregation import wire
from fedshelf.privacy.secure_aggregation.context import RoundContext
from fedshelf.privacy.secure_aggregation.keys import KeyAdvertisement
from fedshelf.privacy.secure_aggregation.masking import MaskedUpload
from fedshelf.privacy.secure_aggregation.server import ServerRecord, ServerRound
from fedshelf.privacy.secure_aggregation.shares import SealedShares
from fedshelf.privacy.secure_aggregation.survivors import SurvivorsSignature
from fedshelf.privacy.secure_aggregation.unmasking import RevealedShares
from fedshelf.rounds.dispatch import Patience
from fedshelf.rounds.masking_client import task_digest
from fedshelf.rounds.plan import Context
from fedshelf.rounds.round_progress import RoundProgress

logger = logging.getLogger(__name__)

FACTOR, AT_LEAST_SECONDS = 3.0, 20.0
"""How long a stage waits for the other half, relative to the first one, and in addition."""
MOST_CHARACTERS = 256 << 20
"""Of a saved record, which has the shares of all members."""


class MaskedRound:
    """The masks of one attempt at a round.

    Args:
        context: the run.
        encode: encodes uploads.
        progress: the replies; updated with members that drop out.
        opened: the attempt.
    """

    def __init__(
        self, context: Context, encode: EncodeSummand, progress: RoundProgress, opened: OpenRound
    ) -> None:  # fmt: skip
        self._context = context
        self._encode = encode
        self._progress = progress
        self._opened = opened
        self._key = opened.key
        self._round: ServerRound | None = None

    def begin(self, state: ServerState) -> None:
        """Stages A and B, unless a previous server process has closed stage C.

        Raises:
            RefusedError: too few members are left; nothing was revealed.
        """
        if self.is_closed:
            return
        context, layout = self._context, self._context.model.layout
        task = Broadcast(
            key=self._key, purpose=Purpose.TRAIN, client_lr=context.plan.client_lr(self._key.round),
            vectors={
                PARAMS: state.model.published,
                **auxiliary_vectors(context.algorithm.broadcast(state.model, layout.num_trainable)),
            },
        )  # fmt: skip
        about = RoundContext(
            key=self._key, model=task_digest(task), config=context.plan.config_digest,
            sizes=self._encode.grid(layout).sizes, threshold=context.plan.threshold,
        )  # fmt: skip
        self._round = server = ServerRound(ServerRecord(context=about))
        cohort = self._opened.cohort
        self._ask(cohort, MaskingStage.KEYS, about, KeyAdvertisement, server.add_keys)
        roster = server.close_keys()
        self._ask(roster.members, MaskingStage.SHARES, roster, SealedShares, server.add_shares)
        server.close_shares()

    @property
    def is_closed(self) -> bool:
        """Whether it is fixed whose uploads are added up."""
        return bool(self._opened.masking)

    def delivery(self, name: str) -> str:
        """What the task of a member holds for stage C."""
        return wire.to_text(self._server.delivery(name))

    def sum(
        self, members: Iterable[str], uploads: Callable[[str], tuple[Integers, ...]]
    ) -> tuple[tuple[Integers, ...], list[str]]:
        """Stages D and E.

        Args:
            members: whose uploads have arrived.
            uploads: returns the codes of an upload.

        Returns:
            The sum of the survivors' codes, without masks, and the survivors.

        Raises:
            RefusedError: too few members are left, or their shares do not open the sum.
        """
        if self.is_closed:
            record = wire.from_text(self._opened.masking, ServerRecord, most=MOST_CHARACTERS)
            self._round = server = ServerRound(record)
        else:
            server = self._server
            for name in members:
                roster = server.record.roster
                digest = b"" if roster is None else roster.digest
                server.add_upload(MaskedUpload(member=name, roster=digest, vectors=uploads(name)))
            server.close_uploads()
            self._opened = replace(self._opened, masking=wire.to_text(server.record))
            self._context.ports.checkpoints.save_open_round(self._opened)
        total = add_up(self._encode.grid(self._context.model.layout).zeros(), map(uploads, server.survivors))
        self._ask(
            server.survivors, MaskingStage.SURVIVORS, server.record.survivors, SurvivorsSignature,
            server.add_signature, drops_out=False,
        )  # fmt: skip
        self._ask(
            server.survivors, MaskingStage.UNMASKING, server.signatures(), RevealedShares, server.add_revealed,
            enough=server.can_open, drops_out=False,
        )  # fmt: skip
        if not server.can_open():
            raise RefusedError("too few stores have revealed their shares: the sum stays masked")
        server.open(total)
        return total, list(server.survivors)

    @property
    def _server(self) -> ServerRound:
        if self._round is None:
            raise ValueError("a round of masks that has not begun")
        return self._round

    def _ask(
        self, names: Iterable[str], stage: MaskingStage, message: object, kind: type[Any], add: Callable[[Any], None],
        *, enough: Callable[[], bool] = lambda: False, drops_out: bool = True,
    ) -> None:  # fmt: skip
        """Send members the message of one stage, and wait for their answers.

        Args:
            names: the members.
            stage: the stage.
            message: the same for all of them.
            kind: the class of an answer.
            add: takes an answer.
            enough: whether no more answers are needed.
            drops_out: whether a member without an answer takes no further part in the round.
        """
        context, progress = self._context, self._progress
        waiting = set(names)
        request = MaskingRequest(key=self._key, stage=stage, content=wire.to_text(message))
        patience = Patience(len(waiting), factor=FACTOR, at_least=AT_LEAST_SECONDS, timer=context.timer)

        def on_reply(reply: Reply) -> None:
            waiting.discard(reply.client)
            patience.on_reply()
            try:
                add(_message(reply, stage, kind))
            except RefusedError as error:
                self._note(reply.client, stage, str(error), drops_out=drops_out, refused=_is_refused(reply))
                will_repeat = isinstance(reply.message, Failure) and reply.message.will_repeat
                context.membership.on_failed(reply.client, str(error), will_repeat=will_repeat)

        context.dispatcher.dispatch(
            sorted(waiting), self._key, lambda name: request, on_reply, seconds=context.plan.rounds.timeout,
            traffic=progress, enough=lambda now: patience.is_over(now) or enough(),
        )  # fmt: skip
        if enough():
            return
        for name in waiting:
            there = context.membership.address(name) is not None
            reason = "no answer in time" if there else context.membership.absence(name)
            self._note(name, stage, reason, drops_out=drops_out)

    def _note(self, name: str, stage: MaskingStage, reason: str, *, drops_out: bool, refused: bool = False) -> None:
        said = f"secure aggregation, stage '{stage.value}': {reason}"
        if not drops_out:  # its upload counts
            logger.warning("round %d: %s: %s", self._key.round, name, said)
            return
        status = ClientStatus.REFUSED if refused else ClientStatus.FAILED
        self._progress.members[name] = Participation(client=name, status=status, reason=said)


def _is_refused(reply: Reply) -> bool:
    return isinstance(reply.message, Failure) and reply.message.refused


def _message(reply: Reply, stage: MaskingStage, kind: type[Any]) -> Any:
    """The content of a reply.

    Raises:
        RefusedError: the client has failed, or it is no answer of this stage.
    """
    message = reply.message
    if isinstance(message, Failure):
        raise RefusedError(message.reason)
    if not isinstance(message, MaskingReply) or message.stage is not stage:
        raise RefusedError(reply.reason or f"it answered stage '{stage.value}' with something else")
    found = wire.from_text(message.content, kind)
    if found.member != reply.client:
        raise RefusedError("it answered in another store's name")
    return found


def add_up(total: tuple[Integers, ...], uploads: Iterable[tuple[Integers, ...]]) -> tuple[Integers, ...]:
    """Add integers in place, modulo their sizes; return `total`."""
    for codes in uploads:
        for into, part in zip(total, codes, strict=True):
            np.add(into, part, out=into)
    return total


def summed(
    context: Context, encode: EncodeSummand, uploads: Mapping[str, Upload], masks: MaskedRound | None
) -> tuple[Aggregate, float | None]:
    """The aggregate of encoded uploads.

    Args:
        context: the run.
        encode: has encoded them.
        uploads: by client.
        masks: their masks; None: they have none.

    Returns:
        The aggregate, and the mean loss of training, if any upload has one.

    Raises:
        RefusedError: the masks cannot be taken out, or the weights add up to nothing.
    """
    layout = context.model.layout
    if len(uploads) > encode.codec.summands:
        raise RunError(
            f"{counted(len(uploads), 'upload')} do not fit into a sum of {encode.codec.text}: give it room, for "
            f"instance by --codec-up modular:32:0:{len(uploads)}"
        )

    def codes(name: str) -> tuple[Integers, ...]:
        if name not in uploads:
            raise RefusedError(f"the upload of {name} can no longer be read from the server's disk")
        return encode.codes(uploads[name], layout)

    names = sorted(uploads)
    if masks is None:
        total = add_up(encode.grid(layout).zeros(), map(codes, names))
    else:
        total, names = masks.sum(names, codes)
    return aggregate_of(context, encode, total, len(names))


def aggregate_of(
    context: Context, encode: EncodeSummand, total: tuple[Integers, ...], count: int
) -> tuple[Aggregate, float | None]:  # fmt: skip
    """Decode a sum.

    Args:
        context: the run.
        encode: has encoded the uploads.
        total: the sum of their codes.
        count: number of uploads in it.

    Returns:
        The aggregate, and the mean loss of training, if any upload has one.

    Raises:
        RefusedError: the weights add up to nothing.
    """
    layout = context.model.layout
    vectors, numbers = encode.grid(layout).decode(total)
    weight = numbers["weight"]
    if weight <= 0:
        raise RefusedError(f"the weights of {counted(count, 'upload')} add up to {weight:g}")
    specs = context.algorithm.vectors(layout)
    delta = vectors.pop(DELTA) / weight
    auxiliary = {
        name.removeprefix(AUXILIARY): (vector / count).to(getattr(torch, specs[name].dtype))
        for name, vector in vectors.items()
    }
    aggregate = Aggregate(
        delta=delta.float(), num_clients=count, num_trainable=layout.num_trainable, mean_weight=weight / count,
        auxiliary=auxiliary,
    )  # fmt: skip
    return aggregate, numbers["loss"] / numbers["loss_weight"] if numbers["loss_weight"] > 0 else None
