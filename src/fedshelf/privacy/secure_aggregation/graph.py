"""Who shares masks with whom. Bell et al. 2020, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead".

Up to 128 members, everyone with everyone. Above, a Harary graph of degree k = 100: the members stand on a ring, ordered
by a hash of the signed roster, and each has the k/2 next ones on either side as neighbors. It is k-connected: it stays
in one piece whichever k - 1 members drop out.

Differs from the paper: k is fixed instead of derived from shares of corrupt and absent members (see
docs/explanation/secure-aggregation.md for the probabilities); the order comes from a hash of all members' fresh keys
and signatures instead of a random draw of the server; every client checks that the survivors are in one piece.
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

MOST_COMPLETE = 128
"""Members of the largest complete graph."""
DEGREE = 100
"""k of a Harary graph; even."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Graph:
    """Neighbors among the members of a round.

    Attributes:
        ring: all members in the order of the ring.
        reach: how far neighbors are apart on the ring.
    """

    ring: Sequence[str]
    reach: int
    _place: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_place", {name: place for place, name in enumerate(self.ring)})

    @classmethod
    @lru_cache(maxsize=2)
    def of(cls, members: tuple[str, ...], roster: bytes) -> "Graph":
        """The graph of a round.

        Args:
            members: names, each once.
            roster: digest of the round's roster, for the order.
        """

        def hashed(name: str) -> bytes:
            return hashlib.sha256(roster + name.encode()).digest()

        reach = (DEGREE if len(members) > MOST_COMPLETE else len(members)) // 2
        return cls(ring=sorted(members, key=hashed), reach=reach)

    def neighbors(self, name: str) -> list[str]:
        """The neighbors of `name`, sorted."""
        count, place = len(self.ring), self._place[name]
        near = {(place + step) % count for distance in range(1, self.reach + 1) for step in (distance, -distance)}
        return sorted(self.ring[index] for index in near - {place})

    def is_connected(self, members: Collection[str]) -> bool:
        """Whether `members` (at least one) are in one piece without the others."""
        places, count = sorted(self._place[name] for name in members), len(self.ring)
        gaps = [after - before for before, after in zip(places, [*places[1:], places[0] + count], strict=True)]
        return sum(gap > self.reach for gap in gaps) <= 1
