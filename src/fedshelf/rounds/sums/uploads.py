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
from fedshelf.compression.unit_ball import WITHIN
from fedshelf.compression.upload_grid import Integers
from fedshelf.core.errors import RefusedError, RunError
from fedshelf.core.events import ClientStatus, Participation
from fedshelf.core.messages import (
    AUXILIARY,
    DELTA,
    PARAMS,
    Broadcast,
    Failure,
    MaskingRequest,
    MaskingStage,
    Purpose,
    Upload,
    auxiliary_vectors,
)
from fedshelf.core.ports import Reply
from fedshelf.core.state import OpenRound, ServerState
from fedshelf.core.text import counted
from fedshelf.privacy.client_dp import Within
from fedshelf.privacy.secure_aggregation import wire
from fedshelf.privacy.secure_aggregation.context import RoundContext
from fedshelf.privacy.secure_aggregation.keys import KeyAdvertisement
from fedshelf.privacy.secure_aggregation.masking import MaskedUpload
from fedshelf.privacy.secure_aggregation.server import ServerRecord, ServerRound
from fedshelf.privacy.secure_aggregation.shares import SealedShares
from fedshelf.privacy.secure_aggregation.survivors import SurvivorsSignature
from fedshelf.privacy.secure_aggregation.unmasking import RevealedShares
from fedshelf.rounds.plan import Context
from fedshelf.rounds.round_progress import RoundProgress
from fedshelf.rounds.sums.masking_client import task_digest
from fedshelf.rounds.sums.masking_stages import ask

logger = logging.getLogger(__name__)

MOST_CHARACTERS = 256 << 20
"""Of a saved record, which has the shares of all members."""


class MaskedRound:
    """The masks of one attempt at a round.

    Args:
        context: the run.
        encode: encodes uploads.
        progress: the replies; updated with members that drop out.
        opened: the attempt.

    Attributes:
        recorded: whose sum the members may have recorded as opened; empty before stage E.
    """

    recorded: frozenset[str]

    def __init__(
        self, context: Context, encode: EncodeSummand, progress: RoundProgress, opened: OpenRound
    ) -> None:  # fmt: skip
        self._context = context
        self._encode = encode
        self._progress = progress
        self._opened = opened
        self._key = opened.key
        self._round: ServerRound | None = None
        self._identities = context.ports.identities()
        self.recorded: frozenset[str] = frozenset()
        self._task = Broadcast(
            key=opened.key, purpose=Purpose.TRAIN, client_lr=context.plan.client_lr(opened.key.round),
            closed_form=context.closed_form,
        )  # fmt: skip

    def begin(self, state: ServerState) -> None:
        """Stages A and B, unless a previous server process has closed stage C.

        Raises:
            RefusedError: too few members are left; nothing was revealed.
            RunError: the sum has no room for the uploads of all members.
        """
        if self.is_closed:
            return
        check_room(self._encode, len(self._opened.cohort))
        context, layout = self._context, self._context.model.layout
        added = auxiliary_vectors(context.algorithm.broadcast(state.model, layout.num_trainable))
        task = replace(
            self._task, vectors={PARAMS: state.model.published, **added}, clip_norm=named_clip_norm(context, state)
        )  # fmt: skip
        about = RoundContext(
            key=self._key, model=task_digest(task), config=context.plan.config_digest,
            sizes=self._encode.grid(layout).sizes, threshold=context.plan.threshold,
            purpose=task.masked_purpose,
        )  # fmt: skip
        self._round = server = ServerRound(ServerRecord(context=about), identities=self._identities)
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
            RefusedError: too few members are left, or their shares do not open the sum. Members whose shares are at
                fault are excluded for some rounds.
        """
        try:
            total = self._opened_sum(members, uploads)
        except RefusedError:
            for name, why in (self._round.suspects if self._round else {}).items():
                self._note(name, MaskingStage.SHARES, why, drops_out=True, refused=True)
                self._context.membership.suspend(name, why)
            raise
        for name, what in self._server.doubts().items():
            self._note(name, MaskingStage.UNMASKING, f"it has revealed, or was dealt, {what}", drops_out=False)
        return total, list(self._server.survivors)

    def _opened_sum(
        self, members: Iterable[str], uploads: Callable[[str], tuple[Integers, ...]]
    ) -> tuple[Integers, ...]:  # fmt: skip
        if self.is_closed:
            record = wire.from_text(self._opened.masking, ServerRecord, most=MOST_CHARACTERS)
            self._round = server = ServerRound(record, identities=self._identities)
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
        signatures = server.signatures()
        self.recorded = frozenset(server.survivors)
        self._ask(
            server.survivors, MaskingStage.UNMASKING, signatures, RevealedShares, server.add_revealed,
            enough=server.can_open, drops_out=False,
        )  # fmt: skip
        server.open(total)
        return total

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
        request = MaskingRequest(
            key=self._key, stage=stage, content=wire.to_text(message), purpose=self._task.masked_purpose
        )  # fmt: skip

        def on_problem(name: str, reason: str, reply: Reply | None) -> None:
            failure = reply.message if reply and isinstance(reply.message, Failure) else None
            self._note(name, stage, reason, drops_out=drops_out, refused=failure is not None and failure.refused)
            if reply is not None:
                will_repeat = failure is not None and failure.will_repeat
                self._context.membership.on_failed(name, reason, will_repeat=will_repeat)

        ask(
            self._context, names, request, kind, add, on_problem=on_problem, traffic=self._progress, enough=enough
        )  # fmt: skip

    def _note(self, name: str, stage: MaskingStage, reason: str, *, drops_out: bool, refused: bool = False) -> None:
        said = f"secure aggregation, stage '{stage.value}': {reason}"
        members = self._progress.members
        if not drops_out:  # its upload counts
            logger.warning("round %d: %s: %s", self._key.round, name, said)
            if name in members:
                members[name] = replace(members[name], reason=said)
            return
        status = ClientStatus.REFUSED if refused else ClientStatus.FAILED
        members[name] = Participation(client=name, status=status, reason=said)


def check_room(encode: EncodeSummand, num_uploads: int) -> None:
    """Check that a sum has room for so many uploads.

    Raises:
        RunError: it has not.
    """
    if num_uploads > encode.codec.summands:
        raise RunError(
            f"{counted(num_uploads, 'upload')} do not fit into a sum of {encode.codec.text}: give it room, for "
            f"instance by --codec-up modular:32:0:{num_uploads}"
        )


def add_up(total: tuple[Integers, ...], uploads: Iterable[tuple[Integers, ...]]) -> tuple[Integers, ...]:
    """Add integers in place, modulo their sizes; return `total`."""
    for codes in uploads:
        for into, part in zip(total, codes, strict=True):
            np.add(into, part, out=into)
    return total


def named_clip_norm(context: Context, state: ServerState) -> float | None:
    """The norm that clients scale their uploads down to; None if they do not."""
    noisy = context.plan.noisy_mean
    return None if noisy is None or context.uploads.summand is None else state.clip_norm or noisy.clip_norm


def summed(
    context: Context, encode: EncodeSummand, uploads: Mapping[str, Upload], masks: MaskedRound | None,
    clip_norm: float | None = None,
) -> tuple[Aggregate, float | None, Within]:  # fmt: skip
    """The aggregate of encoded uploads.

    Args:
        context: the run.
        encode: has encoded them.
        uploads: by client.
        masks: their masks; None: they have none.
        clip_norm: the norm that clients have scaled them down to; None: they have not.

    Returns:
        The aggregate, the mean loss of training, if any upload has one, and with a clip norm, how many uploads had at
        most that norm.

    Raises:
        RefusedError: the masks cannot be taken out, or the weights add up to nothing.
    """
    layout = context.model.layout
    check_room(encode, len(uploads))

    def codes(name: str) -> tuple[Integers, ...]:
        if name not in uploads:
            raise RefusedError(f"the upload of {name} can no longer be read from the server's disk")
        return encode.codes(uploads[name], layout)

    names = sorted(uploads)
    if masks is None:
        total = add_up(encode.grid(layout).zeros(), map(codes, names))
    else:
        total, names = masks.sum(names, codes)
    return aggregate_of(context, encode, total, len(names), clip_norm)


def aggregate_of(
    context: Context, encode: EncodeSummand, total: tuple[Integers, ...], count: int, clip_norm: float | None = None
) -> tuple[Aggregate, float | None, Within]:  # fmt: skip
    """Decode a sum.

    Args:
        context: the run.
        encode: has encoded the uploads.
        total: the sum of their codes.
        count: number of uploads in it.
        clip_norm: the norm that clients have scaled them down to; None: they have not.

    Returns:
        See `summed`.

    Raises:
        RefusedError: the weights add up to nothing.
    """
    layout = context.model.layout
    vectors, numbers = encode.grid(layout).decode(total)
    weight = numbers["weight"]
    within, scale = float(vectors.pop(WITHIN).item()) if WITHIN in vectors else 0.0, 1.0
    if clip_norm is not None:  # all uploads weigh alike, and a round of nobody is noise alone
        weight, scale = float(max(count, 1)), clip_norm
    if weight <= 0:
        raise RefusedError(f"the weights of {counted(count, 'upload')} add up to {weight:g}")
    specs = context.algorithm.vectors(layout)
    delta = vectors.pop(DELTA, torch.zeros(0)) / weight * scale
    auxiliary = {
        name.removeprefix(AUXILIARY): (vector / max(count, 1) * scale).to(getattr(torch, specs[name].dtype))
        for name, vector in vectors.items()
    }
    aggregate = Aggregate(
        delta=delta.float(), num_clients=count, num_trainable=layout.num_trainable,
        mean_weight=weight / max(count, 1), auxiliary=auxiliary,
    )  # fmt: skip
    loss = numbers["loss"] / numbers["loss_weight"] if numbers["loss_weight"] > 0 else None
    return aggregate, loss, Within(num_uploads=count, total=within)
