"""The server's half of a round: collects the messages of each stage, and closes one stage after another.

The caller decides when to close a stage; closing one with too few members raises a `RefusedError`, and the attempt is
void: nothing has been revealed. All that a server keeps before stage E is public, or sealed for others
(`ServerRecord`), and may be made durable: a restarted server resumes with it, and asks for the rest again.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedshelf.core.errors import RefusedError
from fedshelf.core.text import counted, some
from fedshelf.privacy.secure_aggregation import masks, shamir
from fedshelf.privacy.secure_aggregation.context import RoundContext, threshold_among, threshold_of
from fedshelf.privacy.secure_aggregation.graph import Graph
from fedshelf.privacy.secure_aggregation.keys import Identities, KeyAdvertisement, RoundRoster, agree
from fedshelf.privacy.secure_aggregation.masking import MaskedUpload, binding, check_sizes, own_mask, pair_masks
from fedshelf.privacy.secure_aggregation.shares import SEALED_BYTES, SealedShares, SealedSharesDelivery
from fedshelf.privacy.secure_aggregation.survivors import Survivors, SurvivorsSignature, content
from fedshelf.privacy.secure_aggregation.unmasking import (
    RevealedShares,
    Signatures,
    fits_commitment,
    fits_public,
    restore,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerRecord:
    """What a server needs to resume a round. No secret is in it.

    Attributes:
        context: the round.
        roster: its members, once stage A is closed.
        sealed: by member, the shares that it has dealt.
        dealers: who has dealt shares, once stage B is closed; sorted.
        uploaded: whose masked upload has arrived.
        survivors: whose uploads are added up, once stage C is closed.
        signatures: by member, its signature of the survivors.
    """

    context: RoundContext
    roster: RoundRoster | None = None
    sealed: Mapping[str, SealedShares] = field(default_factory=dict)
    dealers: tuple[str, ...] | None = None
    uploaded: frozenset[str] = frozenset()
    survivors: Survivors | None = None
    signatures: Mapping[str, bytes] = field(default_factory=dict)


class ServerRound:
    """One attempt at a round.

    Args:
        record: the round, new or to resume.
        identities: identity keys of the stores; None: nothing is signed.

    Attributes:
        record: what to make durable before the next message is sent.
        suspect: the member whose shares have made `open` fail; "" for none.
    """

    record: ServerRecord
    suspect: str = ""

    def __init__(self, record: ServerRecord, *, identities: Identities | None = None) -> None:
        self._identities = identities
        self._probe = X25519PrivateKey.generate()
        self._shown: dict[str, KeyAdvertisement] = {}
        self._revealed: dict[str, RevealedShares] = {}
        self.record = record
        if record.roster is not None:
            self._set_up(record.roster)

    def add_keys(self, shown: KeyAdvertisement) -> None:
        """Stage A: a member shows its keys.

        Raises:
            RefusedError: they are not its own for this round, or it has shown some before.
        """
        self._check_open(self.record.roster is None, "keys", shown.member, self._shown)
        shown.check(self.record.context.digest, self._identities)
        for key in (shown.mask_key, shown.seal_key):
            agree(self._probe, key)  # or every other member would fail
        self._shown[shown.member] = shown

    def close_keys(self) -> RoundRoster:
        """Fix the members.

        Raises:
            RefusedError: they are too few, or show the same key.
        """
        threshold_of(len(self._shown), self.record.context.threshold)
        roster = RoundRoster(advertisements=tuple(self._shown[name] for name in sorted(self._shown)))
        roster.check(self.record.context.digest, self._identities)
        self.record = replace(self.record, roster=roster)
        self._set_up(roster)
        return roster

    def add_shares(self, dealt: SealedShares) -> None:
        """Stage B: a member deals its shares.

        Raises:
            RefusedError: it is not a member, has dealt before, or deals to others than its neighbors.
        """
        record = self.record
        self._check_open(record.roster is not None and record.dealers is None, "shares", dealt.member, record.sealed)
        self._check_member(dealt.member, dealt.roster, self._public)
        sizes = {len(sealed) for sealed in dealt.sealed.values()}
        if sorted(dealt.sealed) != self._graph.neighbors(dealt.member) or sizes != {SEALED_BYTES}:
            raise RefusedError(f"'{dealt.member}' deals shares to others than its neighbors, or of another size")
        self.record = replace(record, sealed={**record.sealed, dealt.member: dealt})

    def close_shares(self) -> tuple[str, ...]:
        """Fix who masks.

        Raises:
            RefusedError: they are too few.
        """
        self._check_enough(self.record.sealed, "dealt shares")
        self.record = replace(self.record, dealers=tuple(sorted(self.record.sealed)))
        return self.dealers

    def delivery(self, member: str) -> SealedSharesDelivery:
        """Stage C's message to a member that has dealt shares."""
        near = set(self._graph.neighbors(member)) & set(self.dealers)
        sealed = {peer: self.record.sealed[peer].sealed[member] for peer in sorted(near)}
        return SealedSharesDelivery(roster=self._roster, dealers=self.dealers, sealed=sealed)

    def add_upload(self, upload: MaskedUpload) -> None:
        """Stage C: a member's masked upload has arrived; the caller keeps it.

        Raises:
            RefusedError: the member has not dealt shares, has uploaded before, or sends other sizes.
        """
        record = self.record
        self._check_open(
            record.dealers is not None and record.survivors is None, "upload", upload.member, record.uploaded
        )
        self._check_member(upload.member, upload.roster, self.dealers)
        check_sizes(upload.vectors, record.context.sizes)
        self.record = replace(record, uploaded=record.uploaded | {upload.member})

    def close_uploads(self, lost: Collection[str] = ()) -> Survivors:
        """Fix whose uploads are added up. The record must be durable before the first member is told.

        Args:
            lost: members whose upload has arrived and can no longer be read.

        Raises:
            RefusedError: they are too few, or their graph falls into parts.
        """
        members = tuple(sorted(self.record.uploaded - set(lost)))
        self._check_enough(members, "sent a masked upload")
        if not self._graph.is_connected(members):
            raise RefusedError("the stores that sent a masked upload are not connected by masks: nothing is revealed")
        lonely = [
            name for name in self.dealers if len({*self._graph.neighbors(name), name} & {*members}) < self._needed
        ]
        if lonely:
            raise RefusedError(f"too many dropped out of those who hold shares of {some(lonely)}: nothing is revealed")
        survivors = Survivors(roster=self._roster, members=members)
        self.record = replace(self.record, survivors=survivors)
        return survivors

    def add_signature(self, signed: SurvivorsSignature) -> None:
        """Stage D: a survivor confirms the set.

        Raises:
            RefusedError: it is not one, has signed before, or its signature is not valid.
        """
        record, members = self.record, self.survivors
        self._check_open(not self._revealed, "signature", signed.member, record.signatures)
        self._check_member(signed.member, signed.roster, members)
        if self._identities is not None:
            valid = self._identities[signed.member].verifies(signed.signature, content(self._bound, members))
            if not valid:
                raise RefusedError(f"the survivors are not signed by the identity key of '{signed.member}'")
        self.record = replace(record, signatures={**record.signatures, signed.member: signed.signature})

    def signatures(self) -> Signatures:
        """Stage E's message.

        Raises:
            RefusedError: too few have signed.
        """
        self._check_enough(self.record.signatures, "confirmed the survivors")
        return Signatures(roster=self._roster, signatures=self.record.signatures)

    def add_revealed(self, revealed: RevealedShares) -> None:
        """Stage E: a survivor reveals its shares.

        Raises:
            RefusedError: it is not a survivor, has revealed before, or its shares are of the wrong kind or members.
        """
        member, survivors = revealed.member, set(self.survivors)
        self._check_open(bool(self.record.signatures), "revealed shares", member, self._revealed)
        self._check_member(member, revealed.roster, survivors)
        held = {*self._graph.neighbors(member), member} & set(self.dealers)
        if not (revealed.seeds.keys() <= held & survivors and revealed.mask_keys.keys() <= held - survivors):
            raise RefusedError(f"'{member}' reveals shares that it does not hold, or of the wrong kind")
        if any(len(share) != shamir.SHARE_BYTES for share in [*revealed.seeds.values(), *revealed.mask_keys.values()]):
            raise RefusedError(f"'{member}' reveals shares of another length than {shamir.SHARE_BYTES} bytes")
        self._revealed[member] = revealed

    def can_open(self) -> bool:
        """Whether enough shares have arrived."""
        return all(len(shares) >= self._needed for shares in self._secrets_to_restore().values())

    def open(self, total: Sequence[masks.Integers]) -> None:
        """Take the masks out of a sum.

        Args:
            total: the sum of the survivors' masked uploads; changed in place, and unchanged if this fails.

        Raises:
            RefusedError: there are too few shares, or too many wrong ones; more may still arrive.
        """
        check_sizes(total, self.record.context.sizes)
        survivors = set(self.survivors)
        committed = {shown.member: shown.commitment for shown in self._members()}
        found: dict[str, bytes] = {}
        for name, shares in self._secrets_to_restore().items():
            fits = fits_commitment(committed[name]) if name in survivors else fits_public(self._public[name])
            secret = restore(shares, self._needed, fits, whose=name)
            if secret is None:
                self.suspect = name
                raise RefusedError(f"the shares of the secret of '{name}' do not restore it: it has dealt wrong ones")
            found[name] = secret
        masks.apply(total, self._masks_in_sum(found, survivors))

    def _masks_in_sum(self, found: Mapping[str, bytes], survivors: set[str]) -> Iterable[masks.Mask]:
        """What cancels the masks in the sum: own masks reversed, and the part of those that did not send theirs."""
        for name, secret in found.items():
            if name in survivors:
                yield replace(own_mask(name, secret, self._bound), is_added=False)
            else:
                peers = {u: self._public[u] for u in self._graph.neighbors(name) if u in survivors}
                yield from pair_masks(name, X25519PrivateKey.from_private_bytes(secret), peers, self._bound)

    def _secrets_to_restore(self) -> dict[str, dict[int, bytes]]:
        """By dealer whose masks are in the sum, the shares that have arrived by point."""
        points = {name: place for place, name in enumerate(self._public, start=1)}
        survivors = set(self.survivors)
        wanted: dict[str, dict[int, bytes]] = {
            name: {} for name in self.dealers if name in survivors or survivors & set(self._graph.neighbors(name))
        }
        for holder, revealed in self._revealed.items():
            for name, share in [*revealed.seeds.items(), *revealed.mask_keys.items()]:
                wanted[name][points[holder]] = share
        return wanted

    @property
    def dealers(self) -> tuple[str, ...]:
        """Who masks; empty until stage B is closed."""
        return self.record.dealers or ()

    @property
    def survivors(self) -> tuple[str, ...]:
        """Whose uploads are added up; empty until stage C is closed."""
        return self.record.survivors.members if self.record.survivors is not None else ()

    @property
    def _bound(self) -> bytes:
        return binding(self.record.context, self._roster, self.dealers)

    def _members(self) -> Sequence[KeyAdvertisement]:
        return () if self.record.roster is None else self.record.roster.advertisements

    def _set_up(self, roster: RoundRoster) -> None:
        members = roster.members
        self._roster = roster.digest
        self._threshold = threshold_of(len(members), self.record.context.threshold)
        self._graph = Graph.of(members, self._roster)
        num_holders = len(self._graph.neighbors(members[0])) + 1  # as many for every member
        self._needed = threshold_among(num_holders, self._threshold, len(members))
        self._public = {shown.member: shown.mask_key for shown in roster.advertisements}

    def _check_open(self, is_open: bool, what: str, member: str, before: Collection[str]) -> None:
        if not is_open:
            raise RefusedError(f"the {what} of '{member}' came before or after the stage that it belongs to")
        if member in before:
            raise RefusedError(f"the {what} of '{member}' came twice: not used again")

    def _check_member(self, member: str, roster: bytes, members: Collection[str]) -> None:
        if roster != self._roster:
            raise RefusedError(f"a message of '{member}' belongs to another round, attempt or roster")
        if member not in members:
            raise RefusedError(f"'{member}' is not among the stores of this stage")

    def _check_enough(self, members: Collection[str], did: str) -> None:
        if len(members) < self._threshold:
            raise RefusedError(
                f"{counted(len(members), 'store')} {did}, and the threshold is {self._threshold}: nothing is revealed"
            )
