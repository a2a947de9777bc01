"""Masks: streams of random integers that are added to vectors of integers, and taken out again.

    key    <- HKDF-SHA256(secret, info)              32 bytes; info binds the mask to its round, and says what it is for
    mask   <- AES-256-CTR(key), counter from zero    as little-endian integers, for one vector after another
    vector <- vector ± mask mod 2^BITS

A key makes one mask only, so the counter may start at zero. Vectors are worked on in chunks that stay in the cache,
all masks on one chunk after another: memory does not grow with vectors or masks.

Shapes: vectors of n values of 16, 32 or 64 bits.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeAlias

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

Integers: TypeAlias = NDArray[np.unsignedinteger]
"""A vector of integers modulo 2^BITS, little-endian."""

CHUNK_BYTES = 1 << 17
AT_ONCE = 256
"""Masks whose ciphers are in memory together."""
_ZEROS = bytes(CHUNK_BYTES)
_BLOCK_BYTES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Mask:
    """A mask to add or to subtract.

    Attributes:
        key: 32 bytes.
        is_added: whether it is added; otherwise subtracted.
    """

    key: bytes = field(repr=False)
    is_added: bool


def derive(secret: bytes, info: bytes) -> bytes:
    """Derive a key of 32 bytes from a secret, for one purpose only.

    Args:
        secret: the secret.
        info: names the purpose and its context uniquely.
    """
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(secret)


def apply(vectors: Sequence[Integers], masks: Iterable[Mask]) -> None:
    """Add and subtract masks.

    Args:
        vectors: changed in place.
        masks: each spans all vectors, in their order.
    """
    stream = bytearray(CHUNK_BYTES + _BLOCK_BYTES)
    remaining = iter(masks)
    while some := list(islice(remaining, AT_ONCE)):
        ciphers = [(Cipher(algorithms.AES(mask.key), modes.CTR(bytes(16))).encryptor(), mask.is_added) for mask in some]
        for vector in vectors:
            step = CHUNK_BYTES // vector.itemsize
            numbers = np.frombuffer(stream, vector.dtype, step)
            for start in range(0, vector.size, step):
                chunk = vector[start : start + step]
                zeros, own = memoryview(_ZEROS)[: chunk.nbytes], numbers[: chunk.size]
                for cipher, is_added in ciphers:
                    cipher.update_into(zeros, stream)
                    if is_added:
                        chunk += own
                    else:
                        chunk -= own
