"""Stage A: each member makes two key pairs and a seed for this round, and shows what others need of them.

    server -> client   RoundContext
    client: 1  (m, M), (c, C) <- X25519 key pairs;  b <- 32 random bytes
            2  h <- SHA-256(b)
            3  s <- sign(identity key; context, member, M, C, h)
    client -> server   KeyAdvertisement(member, M, C, h, s)

m gives the masks between two members, c seals the shares that they send each other, and b gives a member's own mask.
All are new in each attempt, since the shares of a member that drops out reveal m.

Differs from the papers: h, by which the server recognizes wrong shares of b.
"""

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from fedshelf.core.errors import RefusedError
from fedshelf.core.ports import IdentityKey
from fedshelf.identity.keys import KeyPair
from fedshelf.privacy.secure_aggregation.context import RoundContext, digest, packed

KEY_BYTES = 32
MOST_SIGNATURE_BYTES = 80
"""ECDSA of P-256 in DER has at most 72."""
Identities = Mapping[str, IdentityKey]
"""Identity keys by member: those of a roster that the chain's key has signed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyAdvertisement:
    """A member's public keys for one attempt at a round.

    Attributes:
        member: its name.
        context: digest of the round's context.
        mask_key: M, an X25519 public key.
        seal_key: C, an X25519 public key.
        commitment: h.
        signature: s (DER); empty without identity keys.
    """

    member: str
    context: bytes
    mask_key: bytes
    seal_key: bytes
    commitment: bytes
    signature: bytes = b""

    def content(self) -> bytes:
        """What the signature covers."""
        return packed("keys", self.context, self.member, self.mask_key, self.seal_key, self.commitment)

    def check(self, context: bytes, identities: Identities | None) -> None:
        """Check that the advertisement belongs to a round, and is its member's.

        Args:
            context: digest of the round's context.
            identities: identity keys; None: nothing is signed.

        Raises:
            RefusedError: it does not, or is not.
        """
        if self.context != context:
            raise RefusedError(f"the keys of '{self.member}' are for another round, attempt, model or configuration")
        if any(len(part) != KEY_BYTES for part in (self.mask_key, self.seal_key, self.commitment)):
            raise RefusedError(f"the keys of '{self.member}' have another length than {KEY_BYTES} bytes")
        if len(self.signature) > MOST_SIGNATURE_BYTES:
            raise RefusedError(f"the signature of '{self.member}' has more than {MOST_SIGNATURE_BYTES} bytes")
        if identities is None:
            return
        identity = identities.get(self.member)
        if identity is None:
            raise RefusedError(f"'{self.member}' is not in the chain's roster: its keys may be invented")
        if not identity.verifies(self.signature, self.content()):
            raise RefusedError(f"the keys of '{self.member}' are not signed by its identity key")


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundSecrets:
    """What a member knows alone. In memory only.

    Attributes:
        mask_key: m.
        seal_key: c.
        seed: b.
    """

    mask_key: X25519PrivateKey = field(repr=False)
    seal_key: X25519PrivateKey = field(repr=False)
    seed: bytes = field(repr=False)


def advertise(
    member: str, context: RoundContext, identity: KeyPair | None
) -> tuple[RoundSecrets, KeyAdvertisement]:  # fmt: skip
    """Lines 1 to 3."""
    own = RoundSecrets(
        mask_key=X25519PrivateKey.generate(), seal_key=X25519PrivateKey.generate(), seed=secrets.token_bytes(KEY_BYTES)
    )
    shown = KeyAdvertisement(
        member=member, context=context.digest, mask_key=own.mask_key.public_key().public_bytes_raw(),
        seal_key=own.seal_key.public_key().public_bytes_raw(), commitment=hashlib.sha256(own.seed).digest(),
    )  # fmt: skip
    return own, shown if identity is None else replace(shown, signature=identity.sign(shown.content()))


@dataclass(frozen=True, kw_only=True)
class RoundRoster:
    """The members of a round with their keys, sorted by name.

    Attributes:
        advertisements: one for each member.
    """

    advertisements: tuple[KeyAdvertisement, ...]

    @cached_property
    def members(self) -> tuple[str, ...]:
        """The names."""
        return tuple(shown.member for shown in self.advertisements)

    @cached_property
    def points(self) -> Mapping[str, int]:
        """By member, where its shares are evaluated."""
        return {name: point for point, name in enumerate(self.members, start=1)}

    @cached_property
    def mask_keys(self) -> Mapping[str, bytes]:
        """M by member."""
        return {shown.member: shown.mask_key for shown in self.advertisements}

    @cached_property
    def seal_keys(self) -> Mapping[str, bytes]:
        """C by member."""
        return {shown.member: shown.seal_key for shown in self.advertisements}

    @cached_property
    def digest(self) -> bytes:
        """Identifies the roster."""
        return digest("roster", *(part for shown in self.advertisements for part in (shown.content(), shown.signature)))

    def check(self, context: bytes, identities: Identities | None) -> None:
        """Check every advertisement, and that no member or key is there twice.

        Raises:
            RefusedError: names the first problem.
        """
        if identities is None and context in self._checked:  # by another simulated member
            return
        members = self.members
        if list(members) != sorted(set(members)):
            raise RefusedError("the roster of the round has a store twice, or is not sorted by name")
        keys = [key for shown in self.advertisements for key in (shown.mask_key, shown.seal_key)]
        if len(set(keys)) < len(keys):
            raise RefusedError("the roster of the round has a key twice: one store could stand for two")
        for shown in self.advertisements:
            shown.check(context, identities)
        if identities is None:
            self._checked.add(context)

    @cached_property
    def _checked(self) -> set[bytes]:
        return set()


def agree(private: X25519PrivateKey, public: bytes) -> bytes:
    """The secret (32 bytes) that two key pairs have in common.

    Raises:
        RefusedError: the public key is one with which every secret is the same.
    """
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise RefusedError("one of the keys for this round gives the same secret with all others") from None
