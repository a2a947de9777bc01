"""Stage E: the members reveal what the masks of the sum consist of, and the server takes them out.

    server -> client   Signatures of the survivors
    client: 1  check that the threshold of survivors has signed the same set
            2  check the rules below against the sums that it has opened before, and record this one durably
            3  for each member u whose shares it holds: its share of b_u if u survived, else that of m_u; never both
    client -> server   RevealedShares(member, {survivor: share of b}, {dropout: share of m})
    server: 4  b_u <- combine, for each survivor u;  m_v <- combine, for each dealer v that dropped out
            5  check b_u against h_u, and m_v against M_v; restore from other shares if they do not fit (`restoration`)
            6  sum x_u <- sum y_u - sum_u PRG(HKDF(b_u)) - sum_v (masks between v and the survivors)

Rules, enforced by each member, for uploads and for evaluations apart:
    * One attempt at a round has one set of survivors, for one roster and one set of dealers.
    * For one model, and for one round, two sets are equal or differ in at least the minimum cohort: training is
      deterministic, so the sums over S and over S without i differ by exactly what i sent. (A server could send a model
      again with one bit changed; in the same round, that does not help it.)
    * The same holds for uploads in which this member sends the same integers: sums over photos do not depend on the
      output layer that the server sends, nor on the round.
"""

import hashlib
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import MaskedPurpose, TaskKey
from fedshelf.core.text import counted
from fedshelf.privacy.secure_aggregation import shamir
from fedshelf.privacy.secure_aggregation.context import LEAST_MEMBERS
from fedshelf.privacy.secure_aggregation.keys import Identities

RANDOM_SETS = 100
"""Sets of shares that are tried if more than one is wrong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Signatures:
    """Who has signed the survivors.

    Attributes:
        roster: digest of the round's roster.
        signatures: by member.
    """

    roster: bytes
    signatures: Mapping[str, bytes]

    def check(self, signed: bytes, survivors: Iterable[str], threshold: int, identities: Identities | None) -> None:
        """Line 1.

        Args:
            signed: from `survivors.content`.
            survivors: the set that this member has signed.
            threshold: how many signatures are needed.
            identities: identity keys; None: nothing is signed, and the server is believed.

        Raises:
            RefusedError: too few have signed this set.
        """
        valid = [
            name
            for name in set(survivors) & self.signatures.keys()
            if identities is None
            or (name in identities and identities[name].verifies(self.signatures[name], signed))
        ]  # fmt: skip
        if len(valid) < threshold:
            raise RefusedError(
                f"{counted(len(valid), 'store')} confirmed these survivors, and the threshold is {threshold}: "
                "this store reveals nothing"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RevealedShares:
    """A holder's shares. Of no member both kinds.

    Attributes:
        member: the holder.
        roster: digest of the round's roster.
        seeds: by survivor, the share of b.
        mask_keys: by dropout, the share of m.
    """

    member: str
    roster: bytes
    seeds: Mapping[str, bytes] = field(repr=False)
    mask_keys: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedSum:
    """A sum that a member helps to open.

    Attributes:
        key: the run, round and attempt.
        model: digest of the model that was trained or evaluated.
        bound: what the masks are bound to (`masking.binding`), in hexadecimal digits.
        members: whose uploads are in the sum.
        purpose: what is summed.
        content: digest of the integers that this member sends, in hexadecimal digits; "" for evaluations.
    """

    key: TaskKey
    model: str
    bound: str
    members: frozenset[str]
    purpose: MaskedPurpose = MaskedPurpose.TRAIN
    content: str = ""

    @property
    def is_evaluation(self) -> bool:
        """Whether it is a sum of figures on validation photos."""
        return self.purpose in (MaskedPurpose.CHOOSE, MaskedPurpose.EVALUATE)


class OpenedSumStore(Protocol):
    """A member's durable record of the sums that it helps to open."""

    def known(self) -> Iterable[OpenedSum]:
        """All that were recorded."""

    def record(self, opened: OpenedSum) -> None:
        """Record one. It is durable when this returns."""


def check_opened_sum(wanted: OpenedSum, known: Iterable[OpenedSum], *, min_cohort: int) -> None:
    """Line 2: the rules.

    Args:
        wanted: the sum to open.
        known: those that were opened before.
        min_cohort: in how many members two sums over one model differ at least.

    Raises:
        RefusedError: a rule does not allow it.
    """
    for other in known:
        if other.is_evaluation is not wanted.is_evaluation:
            continue
        if (other.key, other.purpose) == (wanted.key, wanted.purpose) and other != wanted:
            raise RefusedError(
                f"another set of stores was confirmed for round {wanted.key.round}, attempt {wanted.key.attempt}: a "
                "second sum of the same round would reveal what they differ by"
            )
        difference = len(other.members ^ wanted.members)
        is_same_round = (other.key.run_id, other.key.round) == (wanted.key.run_id, wanted.key.round)
        is_alike = is_same_round or other.model == wanted.model or other.content == wanted.content != ""
        if is_alike and 0 < difference < min_cohort:
            raise RefusedError(
                f"the survivors differ by {counted(difference, 'store')} from those of a sum over the same model or "
                f"photos, or in the same round (round {other.key.round}, attempt {other.key.attempt}): two such sums "
                f"reveal what so few stores sent, and the minimum is {min_cohort}"
            )


def apart(cohort: Sequence[str], recorded: Iterable[Collection[str]], *, least: int) -> tuple[str, ...]:
    """The largest part of a cohort whose sum members may open after sums that they have recorded, by the rules above.

    Args:
        cohort: who could take part.
        recorded: whose sums members of the same round have recorded, though they may not be open.
        least: how many a sum needs.

    Returns:
        Names in the order of `cohort`: all of them if no rule is in the way, or if no part is large enough.
    """
    kept = list(cohort)
    for members in recorded:
        difference = len(set(members) ^ set(kept))
        if 0 < difference < LEAST_MEMBERS:
            spare = [name for name in kept if name in members][difference - LEAST_MEMBERS :]
            kept = [name for name in kept if name not in spare]
    return tuple(kept if len(kept) >= least else cohort)


def restore(
    shares: Mapping[int, bytes], threshold: int, fits: Callable[[bytes], bool], *, doubtful: Collection[int] = ()
) -> tuple[bytes, list[int]] | None:
    """Lines 4 and 5. Tries runs of shares on the ring of points, which gets around one wrong share, then random sets.

    Args:
        shares: by point, the threshold of them at least.
        threshold: how many restore the secret.
        fits: whether the secret is right.
        doubtful: points that are used only if there are too few others.

    Returns:
        The secret and the points of the shares that it was restored from, or None if no set that was tried restores it.
    """
    trusted = sorted(shares.keys() - set(doubtful))
    for points in (trusted, sorted(shares))[len(trusted) < threshold or len(trusted) == len(shares) :]:
        for used in _sets(points, threshold):
            secret = shamir.combine({point: shares[point] for point in used})
            if secret is not None and fits(secret):
                return secret, used
    return None


def _sets(points: Sequence[int], threshold: int) -> Iterable[list[int]]:
    for start in range(len(points) if len(points) > threshold else 1):
        yield sorted((*points[start:], *points[:start])[:threshold])
    if len(points) > threshold + 1:
        draw = random.Random(len(points))
        for _ in range(RANDOM_SETS):
            yield sorted(draw.sample(points, threshold))


def off_polynomial(shares: Mapping[int, bytes], used: Collection[int]) -> list[int]:
    """The points of shares that are not on the polynomial of those that were `used`."""
    known = {point: shares[point] for point in used}
    return [point for point in sorted(shares.keys() - known.keys()) if shamir.share_at(known, point) != shares[point]]


def fits_commitment(commitment: bytes) -> Callable[[bytes], bool]:
    """Whether a seed b is that of h."""
    return lambda secret: hashlib.sha256(secret).digest() == commitment


def fits_public(public: bytes) -> Callable[[bytes], bool]:
    """Whether a private key m is that of M."""
    return lambda secret: X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw() == public
