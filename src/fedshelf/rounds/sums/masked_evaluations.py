"""The sum of a round's evaluations under masks, at the server.

    A keys ─▶ B shares ─▶ C evaluate, masked figures ─▶ D survivors ─▶ E unmasking ─▶ sum

It has the stages of a round's uploads, with keys of its own, and does less where something fails: the round then has no
figures of stores, and its model stays. Nothing is saved, so a restarted server asks again. Stores that remember the
first exchange answer it in the same way, or, if the exchange has become another one, not at all.
"""

import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import numpy as np

from fedshelf.core.errors import RefusedError
from fedshelf.core.events import ClientRefused
from fedshelf.core.messages import Broadcast, Evaluation, Failure, MaskingReply, MaskingRequest, MaskingStage, Purpose
from fedshelf.core.ports import Reply
from fedshelf.privacy.secure_aggregation import wire
from fedshelf.privacy.secure_aggregation.context import RoundContext
from fedshelf.privacy.secure_aggregation.keys import KeyAdvertisement
from fedshelf.privacy.secure_aggregation.masking import MaskedUpload
from fedshelf.privacy.secure_aggregation.masks import Integers
from fedshelf.privacy.secure_aggregation.server import ServerRecord, ServerRound
from fedshelf.privacy.secure_aggregation.shares import SealedShares
from fedshelf.privacy.secure_aggregation.survivors import SurvivorsSignature
from fedshelf.privacy.secure_aggregation.unmasking import RevealedShares
from fedshelf.rounds.dispatch import Patience
from fedshelf.rounds.plan import Context
from fedshelf.rounds.round_progress import RoundProgress
from fedshelf.rounds.sums.evaluations import BITS, EvaluationCodes, SummedEvaluation
from fedshelf.rounds.sums.masking_client import codes_of, task_digest
from fedshelf.rounds.sums.masking_stages import ask

logger = logging.getLogger(__name__)


class MaskedEvaluation:
    """One sum of evaluations.

    Args:
        context: the run.
        progress: updated with the traffic.
        task: what the members evaluate.
        codes: what the integers of an evaluation mean.
    """

    def __init__(
        self, context: Context, progress: RoundProgress, task: Broadcast, codes: EvaluationCodes
    ) -> None:  # fmt: skip
        self._context = context
        self._progress = progress
        self._task = task
        self._codes = codes
        about = RoundContext(
            key=task.key, model=task_digest(task), config=context.plan.config_digest, sizes=((BITS, codes.size),),
            threshold=context.plan.threshold, purpose=task.masked_purpose,
        )  # fmt: skip
        self._round = ServerRound(ServerRecord(context=about), identities=context.ports.identities())

    def run(
        self, names: Collection[str], patience: Callable[[int], Patience], *, num_losses: int = 0
    ) -> SummedEvaluation | None:  # fmt: skip
        """Add up the figures of stores.

        Args:
            names: the stores.
            patience: bounds how long so many of them evaluate.
            num_losses: losses of each candidate.

        Returns:
            The sum; None if too few stores are left for one, or it contradicts itself.
        """
        server = self._round
        try:
            self._ask(names, MaskingStage.KEYS, server.record.context, KeyAdvertisement, server.add_keys)
            roster = server.close_keys()
            self._ask(roster.members, MaskingStage.SHARES, roster, SealedShares, server.add_shares)
            total = self._collect(server.close_shares(), patience)
            survivors = server.close_uploads()
            members = survivors.members
            self._ask(members, MaskingStage.SURVIVORS, survivors, SurvivorsSignature, server.add_signature)
            self._ask(
                members, MaskingStage.UNMASKING, server.signatures(), RevealedShares, server.add_revealed,
                enough=server.can_open,
            )  # fmt: skip
            server.open((total,))
            found = self._codes.decode(total, num_losses=num_losses)
        except RefusedError as error:
            logger.warning("round %d has no figures of the stores: %s", self._task.key.round, error)
            for name, why in server.suspects.items():
                self._context.membership.suspend(name, why)
            return None
        for name in members:
            self._context.membership.on_succeeded(name, doing=Purpose.EVALUATE)
        return found

    def _collect(self, names: Collection[str], make_patience: Callable[[int], Patience]) -> Integers:
        """Stage C; returns the sum of the masked figures."""
        patience = make_patience(len(names))
        context, total = self._context, np.zeros(self._codes.size, "<u8")
        waiting = set(names)

        def on_reply(reply: Reply) -> None:
            waiting.discard(reply.client)
            patience.on_reply()
            message, roster = reply.message, self._round.record.roster
            try:
                if isinstance(message, Failure):
                    raise RefusedError(message.reason)
                if not isinstance(message, Evaluation) or message.key != self._task.key or roster is None:
                    raise RefusedError(reply.reason or "it is for other work, or something else")
                codes = codes_of(message, self._codes.size)
                self._round.add_upload(MaskedUpload(member=reply.client, roster=roster.digest, vectors=(codes,)))
                np.add(total, codes, out=total)
            except RefusedError as error:
                self._without(reply.client, str(error), reply)

        context.dispatcher.dispatch(
            names, self._task.key, lambda name: replace(self._task, masking=wire.to_text(self._round.delivery(name))),
            on_reply, seconds=context.plan.rounds.timeout, traffic=self._progress, enough=patience.is_over,
            answers=lambda reply: not isinstance(reply.message, MaskingReply),
        )  # fmt: skip
        for name in sorted(waiting):
            self._without(name, "no evaluation in time", None)
        return total

    def _ask(
        self, names: Collection[str], stage: MaskingStage, message: object, kind: type[Any],
        add: Callable[[Any], None], *, enough: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        request = MaskingRequest(
            key=self._task.key, stage=stage, content=wire.to_text(message), purpose=self._task.masked_purpose
        )  # fmt: skip
        ask(
            self._context, names, request, kind, add, on_problem=self._without, traffic=self._progress, enough=enough
        )  # fmt: skip

    def _without(self, name: str, reason: str, reply: Reply | None) -> None:
        """Record that the figures of a store are not in the sum."""
        context, reason = self._context, f"its figures are not in the sum: {reason}"
        failure = reply.message if reply is not None and isinstance(reply.message, Failure) else None
        if failure is not None and failure.refused:
            context.membership.on_refused(name, reason, doing=Purpose.EVALUATE)
        elif context.membership.address(name) is not None:
            context.ports.sink.emit(ClientRefused(client=name, reason=reason))
            will_repeat = failure is not None and failure.will_repeat
            context.membership.on_failed(name, reason, doing=Purpose.EVALUATE, will_repeat=will_repeat)
