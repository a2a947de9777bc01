"""Stage B: each member gives its neighbors a share of its two secrets, sealed for each of them.

    server -> client   RoundRoster
    client: 1  check that all keys are signed for this round, that its own is among them, and that they are enough
            2  H <- its neighbors and itself;  t' <- the part of H that opens a secret
            3  b_x, m_x <- Shamir shares of b and m, for each holder x in H
            4  e_x <- AES-256-GCM(HKDF(X25519(c, C_x)); b_x, m_x), for each neighbor x
    client -> server   SealedShares(member, {x: e_x})
    server -> client   SealedSharesDelivery(dealers, {dealer: e})

A key seals one message only: it is bound to the roster, the sender and the receiver. The nonce is therefore constant.
The server does not send on before the threshold of members has dealt; who has is in the delivery, by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedshelf.privacy.secure_aggregation import shamir
from fedshelf.privacy.secure_aggregation.context import packed
from fedshelf.privacy.secure_aggregation.keys import RoundSecrets
from fedshelf.privacy.secure_aggregation.masks import derive

SEALED_BYTES = 2 * shamir.SHARE_BYTES + 16
_NONCE = bytes(12)


@dataclass(frozen=True, kw_only=True, slots=True)
class SealedShares:
    """A member's shares for its neighbors.

    Attributes:
        member: its name.
        roster: digest of the round's roster.
        sealed: by receiver, two shares that only the receiver can read.
    """

    member: str
    roster: bytes
    sealed: Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class SealedSharesDelivery:
    """The shares for one member.

    Attributes:
        roster: digest of the round's roster.
        dealers: all members that have dealt shares, sorted; they mask.
        sealed: by sender, its shares for this member.
    """

    roster: bytes
    dealers: tuple[str, ...]
    sealed: Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldShares:
    """One holder's shares of one member's secrets.

    Attributes:
        seed: of b.
        mask_key: of m.
    """

    seed: bytes = field(repr=False)
    mask_key: bytes = field(repr=False)


def deal(secrets: RoundSecrets, points: Mapping[str, int], threshold: int) -> dict[str, HeldShares]:
    """Line 3.

    Args:
        secrets: the member's secrets.
        points: by holder, where its shares are evaluated.
        threshold: t'.
    """
    seeds = shamir.split(secrets.seed, points.values(), threshold)
    keys = shamir.split(secrets.mask_key.private_bytes_raw(), points.values(), threshold)
    return {name: HeldShares(seed=seeds[x], mask_key=keys[x]) for name, x in points.items()}


def seal(shares: HeldShares, secret: bytes, parties: Sequence[str], roster: bytes) -> bytes:
    """Line 4.

    Args:
        shares: the receiver's shares.
        secret: X25519 of the sender's c and the receiver's C.
        parties: sender and receiver.
        roster: digest of the round's roster.
    """
    return _cipher(secret, parties, roster).encrypt(_NONCE, shares.seed + shares.mask_key, None)


def unseal(sealed: bytes, secret: bytes, parties: Sequence[str], roster: bytes) -> HeldShares | None:
    """The reverse of `seal`, at the receiver; None if the shares are not the sender's for this round and receiver."""
    try:
        content = _cipher(secret, parties, roster).decrypt(_NONCE, sealed, None)
    except InvalidTag:
        return None
    return HeldShares(seed=content[: shamir.SHARE_BYTES], mask_key=content[shamir.SHARE_BYTES :])


def _cipher(secret: bytes, parties: Sequence[str], roster: bytes) -> AESGCM:
    return AESGCM(derive(secret, packed("seal", roster, *parties)))
