"""Stage C: each member that has dealt shares sends its integers under masks that cancel in the sum.

    server -> client   SealedSharesDelivery, and the model to train
    client: 1  check that the threshold of members has dealt, and the model's digest
            2  k_v <- HKDF(X25519(m, M_v)),  for each neighbor v that has dealt;  k <- HKDF(b)
            3  y <- x + PRG(k) + sum_{v > u} PRG(k_v) - sum_{v < u} PRG(k_v)  mod 2^BITS
    client -> server   y

All keys are bound to the context (run, round, attempt, model, configuration), the roster and the set of dealers. A
server that shows different ones of these to different members gets masks that do not cancel.
y is made once: two different x under the same masks would reveal their difference.

Shapes: x and y are vectors of n_i integers of BITS_i bits (`RoundContext.sizes`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedshelf.core.errors import RefusedError
from fedshelf.privacy.secure_aggregation.context import RoundContext, digest, digest_of_names, packed
from fedshelf.privacy.secure_aggregation.keys import agree
from fedshelf.privacy.secure_aggregation.masks import Integers, Mask, derive


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MaskedUpload:
    """A member's masked integers.

    Attributes:
        member: its name.
        roster: digest of the round's roster.
        vectors: y.
    """

    member: str
    roster: bytes
    vectors: tuple[Integers, ...]


def binding(context: RoundContext, roster: bytes, dealers: Iterable[str]) -> bytes:
    """The digest of all that masks are bound to."""
    return digest("masks", context.digest, roster, digest_of_names(dealers))


def pair_masks(
    member: str, key: X25519PrivateKey, peers: Mapping[str, bytes], bound: bytes
) -> Iterable[Mask]:  # fmt: skip
    """The masks between a member and others, as the member applies them.

    Args:
        member: u.
        key: its m.
        peers: M_v by v.
        bound: from `binding`.
    """
    for peer, public in peers.items():
        low, high = sorted((member, peer))
        yield Mask(key=derive(agree(key, public), packed("pair", bound, low, high)), is_added=member < peer)


def own_mask(member: str, seed: bytes, bound: bytes) -> Mask:
    """A member's own mask, as the member applies it."""
    return Mask(key=derive(seed, packed("own", bound, member)), is_added=True)


def check_sizes(vectors: Sequence[Integers], sizes: Sequence[tuple[int, int]]) -> None:
    """Check the types and sizes of an upload's vectors.

    Raises:
        RefusedError: they are others.
    """
    found = [(vector.dtype.str, vector.shape) for vector in vectors]
    wanted = [(np.dtype(f"<u{bits // 8}").str, (size,)) for bits, size in sizes]
    if found != wanted:
        raise RefusedError(f"the upload has vectors of {found} instead of {wanted}")
