"""Stage D: the server fixes whose uploads are added up, and the members sign that there is one such set.

    server             fixes the survivors, and makes them durable
    server -> client   Survivors
    client: 1  check that they are among the dealers, the threshold at least, connected, and that it is one of them
            2  s <- sign(identity key; context, roster, dealers, survivors), once for this roster
    client -> server   SurvivorsSignature(member, s, dealers whose shares it cannot read)
    server             if so many cannot read a dealer's shares that its secrets are lost: the attempt is void

More than half of the members sign, and each signs one set: two sets cannot both have the threshold of signatures. What
is signed has the fresh keys in it, so a restarted client, whose keys are gone, cannot sign a second set for them.
An attempt that is void here has opened nothing, and no member has recorded it: the next one may leave out the dealer.
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
        unreadable: dealers whose shares for this member could not be opened, sorted.
    """

    member: str
    roster: bytes
    signature: bytes = b""
    unreadable: tuple[str, ...] = ()


def content(bound: bytes, members: Iterable[str]) -> bytes:
    """What a member signs (line 2)."""
    return packed("survivors", bound, digest_of_names(members))
