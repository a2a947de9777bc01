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
from fedshelf.privacy.secure_aggregation.keys import (
    MOST_SIGNATURE_BYTES,
    Identities,
    KeyAdvertisement,
    RoundRoster,
    agree,
)
from fedshelf.privacy.secure_aggregation.masking import MaskedUpload, binding, check_sizes, own_mask, pair_masks
from fedshelf.privacy.secure_aggregation.restoration import Restoration
from fedshelf.privacy.secure_aggregation.shares import SEALED_BYTES, SealedShares, SealedSharesDelivery
from fedshelf.privacy.secure_aggregation.survivors import Survivors, SurvivorsSignature, content
from fedshelf.privacy.secure_aggregation.unmasking import (
    RevealedShares,
    Signatures,
    fits_commitment,
    fits_public,
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
        suspects: by member whose shares have made a stage fail, why.
    """

    record: ServerRecord

    def __init__(self, record: ServerRecord, *, identities: Identities | None = None) -> None:
        self._identities = identities
        self._probe = X25519PrivateKey.generate()
        self._shown: dict[str, KeyAdvertisement] = {}
        self._keys: set[bytes] = set()
        self._revealed: set[str] = set()
        self._restoration: Restoration | None = None
        self._bound_to: tuple[bytes, tuple[str, ...]] = (b"", ())
        self._unreadable: dict[str, list[str]] = {}  # by dealer, who cannot read its shares
        self.suspects: dict[str, str] = {}
        self.record = record
        if record.roster is not None:
            self._set_up(record.roster)

    def add_keys(self, shown: KeyAdvertisement) -> None:
        """Stage A: a member shows its keys.

        Raises:
            RefusedError: they are not its own for this round, or it has shown some before, or somebody else has.
        """
        self._check_open(self.record.roster is None, "keys", shown.member, self._shown)
        shown.check(self.record.context.digest, self._identities)
        keys = {shown.mask_key, shown.seal_key}
        if len(keys) < 2 or keys & self._keys:  # or every other member would refuse the roster
            raise RefusedError(f"'{shown.member}' shows a key twice, or that of another store")
        for key in keys:
            agree(self._probe, key)  # or every other member would fail
        self._keys |= keys
        self._shown[shown.member] = shown

    def close_keys(self) -> RoundRoster:
        """Fix the members.

        Raises:
            RefusedError: they are too few.
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
            identity = self._identities.get(signed.member)  # None: revoked since
            if identity is None or not identity.verifies(signed.signature, content(self._bound, members)):
                raise RefusedError(f"the survivors are not signed by the identity key of '{signed.member}'")
        near = set(self._graph.neighbors(signed.member)) & set(self.dealers)
        if len(signed.signature) > MOST_SIGNATURE_BYTES or not near.issuperset(signed.unreadable):
            raise RefusedError(f"'{signed.member}' signs with too long a signature, or reports shares not sent to it")
        for dealer in set(signed.unreadable):
            self._unreadable.setdefault(dealer, []).append(signed.member)
        self.record = replace(record, signatures={**record.signatures, signed.member: signed.signature})

    def signatures(self) -> Signatures:
        """Stage E's message.

        Raises:
            RefusedError: too few have signed, or can read the shares of a dealer. No member has recorded the sum.
        """
        self._check_enough(self.record.signatures, "confirmed the survivors")
        for dealer, holders in sorted(self._unreadable.items()):
            if len(self._graph.neighbors(dealer)) + 1 - len(holders) < self._needed:
                self.suspects[dealer] = f"{some(holders)} cannot read the shares that it has dealt"
        if self.suspects:
            raise RefusedError(f"too few can read the shares of {some(sorted(self.suspects))}: nothing is revealed")
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
        shares = {**revealed.seeds, **revealed.mask_keys}
        if any(len(share) != shamir.SHARE_BYTES for share in shares.values()):
            raise RefusedError(f"'{member}' reveals shares of another length than {shamir.SHARE_BYTES} bytes")
        self._revealed.add(member)
        self._restoring().add(self._points[member], shares)

    def can_open(self) -> bool:
        """Whether the shares that have arrived restore all secrets."""
        return self._restoring().is_complete()

    def doubts(self) -> Mapping[str, str]:
        """By member that has revealed wrong shares, or was dealt some: of whom."""
        return {name: f"a wrong share of the secret of {some(of)}" for name, of in self._restoring().doubts.items()}

    def open(self, total: Sequence[masks.Integers]) -> None:
        """Take the masks out of a sum.

        Args:
            total: the sum of the survivors' masked uploads; changed in place, and unchanged if this fails.

        Raises:
            RefusedError: there are too few shares, or too many wrong ones; more may still arrive.
        """
        check_sizes(total, self.record.context.sizes)
        restoration = self._restoring()
        if not restoration.is_complete():
            for name in restoration.suspects(most=max(1, len(self._members()) - self._threshold)):
                self.suspects[name] = "its shares do not restore its secret: it has dealt wrong ones"
            for name in restoration.lacking & self._unreadable.keys() - self._revealed:
                holders = some(self._unreadable[name])
                self.suspects[name] = f"it has revealed nothing, and {holders} cannot read the shares that it has dealt"
            raise RefusedError(f"{restoration.problem()}: the sum stays masked")
        masks.apply(total, self._masks_in_sum(restoration.secrets, set(self.survivors)))

    def _masks_in_sum(self, found: Mapping[str, bytes], survivors: set[str]) -> Iterable[masks.Mask]:
        """What cancels the masks in the sum: own masks reversed, and the part of those that did not send theirs."""
        for name, secret in found.items():
            if name in survivors:
                yield replace(own_mask(name, secret, self._bound), is_added=False)
            else:
                peers = {u: self._public[u] for u in self._graph.neighbors(name) if u in survivors}
                yield from pair_masks(name, X25519PrivateKey.from_private_bytes(secret), peers, self._bound)

    def _restoring(self) -> Restoration:
        """Of the dealers whose masks are in the sum; begins with the first message of stage E."""
        if self._restoration is None:
            survivors, fits = set(self.survivors), {}
            for shown in self._members():
                if shown.member in survivors:
                    fits[shown.member] = fits_commitment(shown.commitment)
                elif shown.member in self.dealers and survivors & set(self._graph.neighbors(shown.member)):
                    fits[shown.member] = fits_public(shown.mask_key)
            holders = {point: name for name, point in self._points.items()}
            self._restoration = Restoration(fits, holders, self._needed)
        return self._restoration

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
        dealers = self.dealers
        if self._bound_to != (self._roster, dealers):
            self._bound_to = self._roster, dealers
            self._known_bound = binding(self.record.context, self._roster, dealers)
        return self._known_bound

    def _members(self) -> Sequence[KeyAdvertisement]:
        return () if self.record.roster is None else self.record.roster.advertisements

    def _set_up(self, roster: RoundRoster) -> None:
        members = roster.members
        self._roster = roster.digest
        self._threshold = threshold_of(len(members), self.record.context.threshold)
        self._graph = Graph.of(members, self._roster)
        num_holders = len(self._graph.neighbors(members[0])) + 1  # as many for every member
        self._needed = threshold_among(num_holders, self._threshold, len(members))
        self._public, self._points = roster.mask_keys, roster.points

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
