"""How the store that decrypts knows that it decrypts a sum of enough stores, and not one store's upload.

It sees a ciphertext only. So each store sends a tag of its slots x, sealed for the other stores, and tags add up:

    r <- AES-256-CTR(HKDF(check key, context)), four vectors of 32-bit integers, as long as x
    tag(x) <- (<r_1, x>, ..., <r_4, x>) mod t

The tag of a sum is the sum of the tags. The server does not know r, and cannot read tags, so a ciphertext that is not
the sum of just those uploads whose tags it shows has the sum of these tags with a probability of about 2^-128.
(Linear homomorphic authentication: Agrawal and Boneh 2009, "Homomorphic MACs".)

A tag is signed for one round and attempt. A store that works with the server can tell it r: then this does not help.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedshelf.core.errors import RefusedError
from fedshelf.core.text import printable
from fedshelf.identity.keys import KeyPair
from fedshelf.privacy.homomorphic.ceremony import StoreKeys
from fedshelf.privacy.homomorphic.packing import Slots
from fedshelf.privacy.homomorphic.parameters import Parameters
from fedshelf.privacy.secure_aggregation.context import RoundContext, packed
from fedshelf.privacy.secure_aggregation.keys import Identities
from fedshelf.privacy.secure_aggregation.masks import derive

NUM_FUNCTIONS = 4
_NUMBER_BYTES, _NONCE_BYTES, _GCM_BYTES = 8, 12, 16
SEALED_BYTES = _NONCE_BYTES + NUM_FUNCTIONS * _NUMBER_BYTES + _GCM_BYTES
_HALF_BITS = 16

Tag = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SealedTag:
    """The tag of a store's upload, which stores alone can read.

    Attributes:
        member: the store.
        round: digest of the round's context.
        model: digest of the model that was trained.
        sealed: nonce and AES-256-GCM of the tag.
        signature: by the store's identity key (DER); empty without identity keys.
    """

    member: str
    round: bytes
    model: str
    sealed: bytes
    signature: bytes = b""

    def content(self) -> bytes:
        """What the signature covers."""
        return packed("he tag", self.round, self.model, self.member, self.sealed)


class Tagger:
    """Computes the tag of slots that come one ciphertext after another.

    Args:
        keys: from the ceremony.
        parameters: of BFV.
    """

    def __init__(self, keys: StoreKeys, parameters: Parameters) -> None:
        key = derive(keys.check_key, packed("he tag vectors", keys.context))
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self._modulus, self._zeros = parameters.plain_modulus, bytes(4 * NUM_FUNCTIONS * parameters.degree)
        self._sums = [0] * NUM_FUNCTIONS

    def add(self, slots: Slots) -> None:
        """Add the slots [N] of one ciphertext."""
        vectors = np.frombuffer(self._stream.update(self._zeros), "<u4").reshape(NUM_FUNCTIONS, -1).astype(np.int64)
        values = slots % self._modulus
        low, high = vectors @ (values & ((1 << _HALF_BITS) - 1)), vectors @ (values >> _HALF_BITS)  # both below 2^61
        self._sums = [
            (total + int(a) + (int(b) << _HALF_BITS)) % self._modulus
            for total, a, b in zip(self._sums, low, high, strict=True)
        ]

    @property
    def tag(self) -> Tag:
        """The tag of all slots so far."""
        return tuple(self._sums)


def seal(tag: Tag, *, member: str, context: RoundContext, keys: StoreKeys, identity: KeyPair | None) -> SealedTag:
    """Seal and sign a tag.

    Args:
        tag: of the store's upload.
        member: the store.
        context: of the round.
        keys: from the ceremony.
        identity: the store's identity key; None: nothing is signed.
    """
    nonce = secrets.token_bytes(_NONCE_BYTES)
    content = b"".join(number.to_bytes(_NUMBER_BYTES, "little") for number in tag)
    sealed = nonce + _cipher(keys).encrypt(nonce, content, packed("he tag of", context.digest, member))
    shown = SealedTag(member=member, round=context.digest, model=context.model, sealed=sealed)
    return shown if identity is None else replace(shown, signature=identity.sign(shown.content()))


def total(
    tags: Mapping[SealedTag, int], *, keys: StoreKeys, identities: Identities | None, parameters: Parameters
) -> Tag:
    """The sum of tags.

    Args:
        tags: weights by tag, of any origin.
        keys: from the ceremony.
        identities: identity keys of the roster; None: nothing is signed.
        parameters: of BFV.

    Raises:
        RefusedError: one of them is not a store's for this run, or an upload is there twice.
    """
    sums = [0] * NUM_FUNCTIONS
    if len({(one.member, one.round) for one in tags}) < len(tags):
        raise RefusedError("an upload is twice in the sum to decrypt")
    for one, weight in tags.items():
        who = f"the tag of '{printable(one.member)}'"
        if identities is not None:
            identity = identities.get(one.member)
            if identity is None or not identity.verifies(one.signature, one.content()):
                raise RefusedError(f"{who} is not signed by a store of the chain's roster")
        nonce, sealed = one.sealed[:_NONCE_BYTES], one.sealed[_NONCE_BYTES:]
        try:
            if len(one.sealed) != SEALED_BYTES:
                raise InvalidTag
            content = _cipher(keys).decrypt(nonce, sealed, packed("he tag of", one.round, one.member))
        except InvalidTag:
            raise RefusedError(f"{who} was not made with this run's check key") from None
        for index, number in enumerate(np.frombuffer(content, "<u8").tolist()):
            sums[index] = (sums[index] + weight * number) % parameters.plain_modulus
    return tuple(sums)


def _cipher(keys: StoreKeys) -> AESGCM:
    return AESGCM(derive(keys.check_key, packed("he seal tags", keys.context)))
