"""The roster: which key belongs to which store. Signed by the chain's key, so that a store can check it.

{"number": 7, "stores": [{"name", "key", "state", "since"}, …], "signature": …}

The number is at least the time of the change in seconds since 1970. So the next change after a restored backup has a
higher number than any roster that a store has seen.
"""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from fedshelf.core.errors import IdentityFileError
from fedshelf.identity.keys import KeyPair, PublicKey, bytes_of, text_of

MAX_BYTES = 4 << 20
"""Of a roster's text. A store does not read a longer one, and nobody is enrolled beyond half of it."""

_CONTEXT = b"fedshelf roster 1\n"
_MAX_NUMBER = 2**53


class StoreState(StrEnum):
    """Whether a key may take part."""

    ACTIVE = "active"
    REVOKED = "revoked"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A store's key.

    Attributes:
        name: the store's name.
        key: its public key.
        state: whether the key may take part.
        since: when that state began (ISO 8601, UTC).
    """

    name: str
    key: PublicKey
    state: StoreState
    since: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Roster:
    """All stores' keys. A name has at most one active key, and a key is active for at most one name.

    Attributes:
        number: increases with each change.
        entries: oldest first.
    """

    number: int = 0
    entries: tuple[Entry, ...] = ()

    def find(self, key: PublicKey) -> Entry | None:
        """The entry of `key`, or None."""
        return next((entry for entry in reversed(self.entries) if entry.key == key), None)

    def active(self, name: str) -> Entry | None:
        """The active entry of the store `name`, or None."""
        found = (entry for entry in self.entries if entry.name == name and entry.state is StoreState.ACTIVE)
        return next(found, None)

    def keys(self) -> Mapping[str, PublicKey]:
        """The active keys by store."""
        return {entry.name: entry.key for entry in self.entries if entry.state is StoreState.ACTIVE}

    def revoked_names(self) -> frozenset[str]:
        """Names of the stores that have been revoked, and have no other key."""
        active = {entry.name for entry in self.entries if entry.state is StoreState.ACTIVE}
        return frozenset(entry.name for entry in self.entries) - active

    def with_key(self, name: str, key: PublicKey, since: str) -> "Roster":
        """Make `key` the only active key of `name`."""
        kept = self.without(name, since).entries
        entry = Entry(name=name, key=key, state=StoreState.ACTIVE, since=since)
        return replace(self.renumbered(), entries=(*kept, entry))

    def without(self, name: str, since: str) -> "Roster":
        """Revoke the active key of `name`."""

        def revoked(entry: Entry) -> Entry:
            matches = entry.name == name and entry.state is StoreState.ACTIVE
            return replace(entry, state=StoreState.REVOKED, since=since) if matches else entry

        return replace(self.renumbered(), entries=tuple(map(revoked, self.entries)))

    def renumbered(self) -> "Roster":
        """The same entries with the next number."""
        return replace(self, number=max(self.number + 1, int(time.time())))

    def signed(self, chain: KeyPair) -> str:
        """The roster's text, signed by the chain's key."""
        fields = {"number": self.number, "stores": _as_json(self.entries)}
        return json.dumps({**fields, "signature": text_of(chain.sign(_content(fields)))}, indent=1) + "\n"

    @classmethod
    def verified(cls, text: str, chain: PublicKey) -> "Roster":
        """Read a roster's text.

        Args:
            text: what `signed` returned.
            chain: the chain's key.

        Raises:
            IdentityError: it is too long, damaged, or not signed by that key.
        """
        try:
            if len(text) > MAX_BYTES:
                raise ValueError
            fields = json.loads(text)
            signature = bytes_of(fields.pop("signature"))
            found = cls(number=fields["number"], entries=tuple(map(_entry, fields["stores"])))
            if chain.verifies(signature, _content(fields)) and found._is_consistent():
                return found
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        raise IdentityFileError("the roster is damaged, or not signed by this chain's key: restore it from a backup")

    def _is_consistent(self) -> bool:
        active = [entry for entry in self.entries if entry.state is StoreState.ACTIVE]
        return (
            type(self.number) is int
            and 0 <= self.number <= _MAX_NUMBER
            and len({entry.name for entry in active}) == len({entry.key for entry in active}) == len(active)
        )


def _entry(fields: Mapping[str, Any]) -> Entry:
    """Read an entry.

    Raises:
        ValueError: it is not one.
    """
    name, key, since = fields["name"], PublicKey(fields["key"]), fields["since"]
    if not (isinstance(name, str) and isinstance(key.text, str) and isinstance(since, str) and key.is_valid):
        raise ValueError
    return Entry(name=name, key=key, state=StoreState(fields["state"]), since=since)


def _as_json(entries: Iterable[Entry]) -> list[dict[str, str]]:
    return [{"name": e.name, "key": e.key.text, "state": e.state.value, "since": e.since} for e in entries]


def _content(fields: Mapping[str, Any]) -> bytes:
    return _CONTEXT + json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
