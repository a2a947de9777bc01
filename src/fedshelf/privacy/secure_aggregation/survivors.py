"""Stage D: the server fixes whose uploads are added up, and the members sign that there is one such set.

    server             fixes the survivors, and makes them durable
    server -> client   Survivors
    client: 1  check that they are among the dealers, the threshold at least, connected, and that it is one of them
            2  s <- sign(identity key; context, roster, dealers, survivors), once for this roster
    client -> server   SurvivorsSignature(member, s)

More than half of the members sign, and each signs one set: two sets cannot both have the threshold of signatures. What
is signed has the fresh keys in it, so a restarted client, whose keys are gone, cannot sign a second set for them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from fedshelf.privacy.secure_aggregation.context import digest_of_names, packed


@dataclass(frozen=True, kw_only=True, slots=True)
class Survivors:
    """The members whose uploads are added up.

    Attributes:
        roster: digest of the round's roster.
        members: names, sorted.
    """

    roster: bytes
    members: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SurvivorsSignature:
    """A member's confirmation of the survivors.

    Attributes:
        member: its name.
        roster: digest of the round's roster.
        signature: s (DER); empty without identity keys.
    """

    member: str
    roster: bytes
    signature: bytes = b""


def content(bound: bytes, members: Iterable[str]) -> bytes:
    """What a member signs (line 2)."""
    return packed("survivors", bound, digest_of_names(members))
