"""The client's half of a round: stages A to E in order, each once.

A message that repeats one before, byte for byte, gets the same reply: a server that was restarted may have lost it.
Any other message of a stage that is over is refused, and so is one whose stage has not begun.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import IntEnum
from typing import Any, TypeVar

import numpy as np

from fedshelf.core.errors import RefusedError
from fedshelf.core.text import counted, some
from fedshelf.identity.keys import KeyPair
from fedshelf.privacy.secure_aggregation import masks
from fedshelf.privacy.secure_aggregation.context import LEAST_MEMBERS, RoundContext, threshold_among, threshold_of
from fedshelf.privacy.secure_aggregation.graph import Graph
from fedshelf.privacy.secure_aggregation.keys import Identities, KeyAdvertisement, RoundRoster, advertise, agree
from fedshelf.privacy.secure_aggregation.masking import MaskedUpload, binding, check_sizes, own_mask, pair_masks
from fedshelf.privacy.secure_aggregation.shares import (
    HeldShares,
    SealedShares,
    SealedSharesDelivery,
    deal,
    seal,
    unseal,
)
from fedshelf.privacy.secure_aggregation.survivors import Survivors, SurvivorsSignature, content
from fedshelf.privacy.secure_aggregation.unmasking import (
    OpenedSum,
    OpenedSumStore,
    RevealedShares,
    Signatures,
    check_opened_sum,
)

Message = TypeVar("Message")
Answer = TypeVar("Answer")


class _Stage(IntEnum):
    KEYS = 0
    ROSTER = 1
    DELIVERY = 2
    UPLOAD = 3
    SURVIVORS = 4
    SIGNATURES = 5


class ClientRound:
    """One member's part in one attempt at a round. Its secrets are in memory only, and end with it.

    Args:
        member: the member's name.
        context: the round, which the caller has compared with what it knows (`RoundContext.check`).
        opened_sums: the member's record of the sums that it helps to open.
        identity: signs; None: nothing is signed.
        identities: all stores' identity keys; None: the server is believed to name real stores.
        min_cohort: how many members a sum has at least, and in how many two sums over one model differ.

    Attributes:
        advertisement: stage A's reply.
        unreadable: members whose shares for this one could not be opened.
        num_members: members of the roster; 0 before stage B.
        threshold: how many of them open the sum; 0 before stage B.
    """

    advertisement: KeyAdvertisement
    unreadable: tuple[str, ...] = ()
    num_members: int = 0
    threshold: int = 0

    def __init__(
        self, member: str, context: RoundContext, *, opened_sums: OpenedSumStore, identity: KeyPair | None = None,
        identities: Identities | None = None, min_cohort: int = LEAST_MEMBERS,
    ) -> None:  # fmt: skip
        self._member = member
        self._context = context
        self._opened_sums = opened_sums
        self._identity = identity
        self._identities = identities
        self._min_cohort = min_cohort
        self._secrets, self.advertisement = advertise(member, context, identity)
        self._done: dict[_Stage, tuple[Any, Any]] = {_Stage.KEYS: (context, self.advertisement)}
        self._held: dict[str, HeldShares] = {}

    def deal(self, roster: RoundRoster) -> SealedShares:
        """Stage B: share the secrets among the neighbors.

        Raises:
            RefusedError: the roster is not one of this round, or has too few members.
        """
        return self._once(_Stage.ROSTER, roster, self._deal)

    def receive(self, delivery: SealedSharesDelivery) -> None:
        """Stage C, before training: take the neighbors' shares.

        Raises:
            RefusedError: too few members have dealt shares, or the delivery is not one of this round.
        """
        self._once(_Stage.DELIVERY, delivery, self._receive)

    def mask(self, vectors: Sequence[masks.Integers], model: str) -> MaskedUpload:
        """Stage C: mask an upload, once. The caller keeps it to send it again.

        Args:
            vectors: integers of the context's sizes; masked in place.
            model: digest of the model that they were trained from.

        Raises:
            RefusedError: the model or the sizes are not those of this round, or an upload was masked before.
        """
        if model != self._context.model:
            raise RefusedError("the model to train is not the one that this round's keys were made for")
        check_sizes(vectors, self._context.sizes)
        if _Stage.UPLOAD in self._done:
            raise RefusedError("an upload of this round is masked already: two under the same masks would be readable")
        self._in_order(_Stage.UPLOAD)
        self._done[_Stage.UPLOAD] = (None, None)
        self._content = _digest(vectors)
        own, peers = self._secrets, {name: self._public[name] for name in self._near}
        mine = own_mask(self._member, own.seed, self._bound)
        masks.apply(vectors, [mine, *pair_masks(self._member, own.mask_key, peers, self._bound)])
        del self._secrets  # the shares that others hold are all that is left of them
        return MaskedUpload(member=self._member, roster=self._roster, vectors=tuple(vectors))

    def confirm(self, survivors: Survivors) -> SurvivorsSignature:
        """Stage D: sign the survivors.

        Raises:
            RefusedError: they are not possible in this round, or a rule does not allow their sum.
        """
        return self._once(_Stage.SURVIVORS, survivors, self._confirm)

    def reveal(self, signatures: Signatures) -> RevealedShares:
        """Stage E: reveal one share of each neighbor, after the sum is recorded durably.

        Raises:
            RefusedError: too few members have signed the same survivors, or a rule does not allow their sum.
        """
        return self._once(_Stage.SIGNATURES, signatures, self._reveal)

    def _once(self, stage: _Stage, message: Message, work: Callable[[Message], Answer]) -> Answer:
        if stage in self._done:
            before, reply = self._done[stage]
            if message != before:
                raise RefusedError(f"a second, different message of stage '{stage.name.lower()}' in one round")
            return reply  # type: ignore[no-any-return]  # of this stage
        self._in_order(stage)
        reply = work(message)
        self._done[stage] = (message, reply)
        return reply

    def _in_order(self, stage: _Stage) -> None:
        missing = [one.name.lower() for one in _Stage if one < stage and one not in self._done]
        if missing:
            raise RefusedError(f"stage '{stage.name.lower()}' is out of order: '{missing[0]}' comes before it")

    def _check_cohort(self, num_members: int, did: str) -> None:
        if num_members < self._min_cohort:
            raise RefusedError(
                f"{counted(num_members, 'store')} {did}, and this store takes part in sums of at least "
                f"{self._min_cohort} only"
            )

    def _check_roster(self, roster: bytes) -> None:
        if roster != self._roster:
            raise RefusedError("the message belongs to another round, attempt or roster")

    def _deal(self, roster: RoundRoster) -> SealedShares:
        roster.check(self._context.digest, self._identities)  # line 1
        if self.advertisement not in roster.advertisements:
            raise RefusedError("the roster of the round does not have the keys that this store has shown")
        members = roster.members
        self.num_members, self.threshold = len(members), threshold_of(len(members), self._context.threshold)
        self._check_cohort(len(members), "are in the round")
        self._roster = roster.digest
        self._graph = Graph.of(members, self._roster)
        neighbors = self._graph.neighbors(self._member)
        holders = sorted([*neighbors, self._member])  # line 2
        self._public, own = roster.mask_keys, self._secrets.seal_key
        needed = threshold_among(len(holders), self.threshold, len(members))
        points = {name: roster.points[name] for name in holders}
        dealt = deal(self._secrets, points, needed)  # line 3
        self._held = {self._member: dealt.pop(self._member)}
        self._seal_secrets = {peer: agree(own, roster.seal_keys[peer]) for peer in neighbors}
        sealed = {
            peer: seal(shares, self._seal_secrets[peer], (self._member, peer), self._roster)  # line 4
            for peer, shares in dealt.items()
        }
        return SealedShares(member=self._member, roster=self._roster, sealed=sealed)

    def _receive(self, delivery: SealedSharesDelivery) -> None:
        self._check_roster(delivery.roster)
        dealers = delivery.dealers
        if list(dealers) != sorted(set(dealers) & self._public.keys()) or self._member not in dealers:
            raise RefusedError("the stores that have dealt shares are not sorted members of the round with this store")
        if len(dealers) < self.threshold:
            raise RefusedError(
                f"{counted(len(dealers), 'store')} dealt shares, and the threshold is {self.threshold}"
            )  # fmt: skip
        near = sorted(set(self._graph.neighbors(self._member)) & set(dealers))
        if sorted(delivery.sealed) != near:
            raise RefusedError("the shares are not those of all neighbors that have dealt some")
        opened = {
            peer: unseal(delivery.sealed[peer], self._seal_secrets[peer], (peer, self._member), self._roster)
            for peer in near
        }  # fmt: skip
        self._dealers, self._near = dealers, near
        self._bound = binding(self._context, self._roster, dealers)
        self.unreadable = tuple(peer for peer, shares in opened.items() if shares is None)
        self._held |= {peer: shares for peer, shares in opened.items() if shares is not None}
        del self._seal_secrets

    def _confirm(self, survivors: Survivors) -> SurvivorsSignature:
        self._check_roster(survivors.roster)
        members = survivors.members
        if list(members) != sorted(set(members) & set(self._dealers)):  # line 1
            raise RefusedError("the survivors are not sorted stores that have dealt shares in this round")
        if self._member not in members:
            raise RefusedError("the survivors do not have this store: its upload did not count")
        if len(members) < self.threshold:
            raise RefusedError(f"{counted(len(members), 'store')} survived, and the threshold is {self.threshold}")
        self._check_cohort(len(members), "survived")
        if not self._graph.is_connected(members):
            raise RefusedError(f"the survivors {some(members)} fall into parts, whose sums could be told apart")
        self._sum = OpenedSum(
            key=self._context.key, model=self._context.model, bound=self._bound.hex(), members=frozenset(members),
            purpose=self._context.purpose,
        )  # fmt: skip
        if not self._sum.is_evaluation:
            self._sum = replace(self._sum, content=self._content)
        check_opened_sum(self._sum, self._opened_sums.known(), min_cohort=self._min_cohort)
        self._signed = content(self._bound, members)
        signature = b"" if self._identity is None else self._identity.sign(self._signed)  # line 2
        return SurvivorsSignature(
            member=self._member, roster=self._roster, signature=signature, unreadable=self.unreadable
        )

    def _reveal(self, signatures: Signatures) -> RevealedShares:
        self._check_roster(signatures.roster)
        survivors = self._sum.members
        signatures.check(self._signed, survivors, self.threshold, self._identities)  # line 1
        known = list(self._opened_sums.known())
        check_opened_sum(self._sum, known, min_cohort=self._min_cohort)  # line 2
        if self._sum not in known:
            self._opened_sums.record(self._sum)
        seeds = {name: shares.seed for name, shares in self._held.items() if name in survivors}  # line 3
        keys = {name: shares.mask_key for name, shares in self._held.items() if name not in survivors}
        return RevealedShares(member=self._member, roster=self._roster, seeds=seeds, mask_keys=keys)


def _digest(vectors: Sequence[masks.Integers]) -> str:
    found = hashlib.sha256()
    for vector in vectors:
        found.update(vector.view(np.uint8).data)
    return found.hexdigest()
