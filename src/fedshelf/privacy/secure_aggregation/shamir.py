"""Shamir 1979, "How to Share a Secret": any t of n shares give the secret, and fewer say nothing about it.

    split:    f(x) <- secret + a_1 x + … + a_{t-1} x^{t-1} mod P,  a_i uniform;  share of x = f(x)
    combine:  secret <- sum_x f(x) · lambda_x,  lambda_x = prod_{z != x} z / (z - x) mod P

P = 2^256 + 297 is the smallest prime above 2^256, so a secret is any 32 bytes, and a share has 33.
"""

import secrets
from collections.abc import Iterable, Mapping
from functools import lru_cache

PRIME = 2**256 + 297
SECRET_BYTES, SHARE_BYTES = 32, 33


def split(secret: bytes, points: Iterable[int], threshold: int) -> dict[int, bytes]:
    """Split `secret` (32 bytes) into shares.

    Args:
        secret: the secret.
        points: where the shares are evaluated: distinct, at least 1, and few compared with P.
        threshold: t.

    Returns:
        The share (33 bytes) of each point.
    """
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    constant = int.from_bytes(secret, "big")
    shares = {}
    for x in points:
        value = 0
        for coefficient in coefficients:
            value = (value + coefficient) * x % PRIME
        shares[x] = ((value + constant) % PRIME).to_bytes(SHARE_BYTES, "big")
    return shares


def combine(shares: Mapping[int, bytes]) -> bytes | None:
    """Restore the secret from t of its shares.

    Args:
        shares: t shares by point.

    Returns:
        The secret (32 bytes), or None if the shares are not those of one.
    """
    value = _interpolated(shares, 0)
    return value.to_bytes(SECRET_BYTES, "big") if value < 2 ** (8 * SECRET_BYTES) else None


def share_at(shares: Mapping[int, bytes], point: int) -> bytes:
    """The share (33 bytes) of another point, from t shares by point."""
    return _interpolated(shares, point).to_bytes(SHARE_BYTES, "big")


def _interpolated(shares: Mapping[int, bytes], at: int) -> int:
    points = tuple(sorted(shares))
    factors = _factors(points, at)
    return sum(int.from_bytes(shares[x], "big") * factor for x, factor in zip(points, factors, strict=True)) % PRIME


@lru_cache(maxsize=256)
def _factors(points: tuple[int, ...], at: int) -> tuple[int, ...]:
    """lambda_x for each point; at 0, that of the secret."""
    found = []
    for x in points:
        above, below = 1, 1
        for z in points:
            if z != x:
                above, below = above * (z - at) % PRIME, below * (z - x) % PRIME
        found.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(found)
