"""The roster: which key belongs to which store. Signed by the chain's key, so that a store can check it.

{"number": 7, "stores": [{"name", "key", "state", "since"}, …], "signature": …}
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from fedshelf.core.errors import IdentityError
from fedshelf.identity.keys import KeyPair, PublicKey, bytes_of, text_of

_CONTEXT = b"fedshelf roster 1\n"


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
    """All stores' keys. A name has at most one active key.

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

    def revoked_names(self) -> frozenset[str]:
        """Names of the stores that have been revoked, and have no other key."""
        active = {entry.name for entry in self.entries if entry.state is StoreState.ACTIVE}
        return frozenset(entry.name for entry in self.entries) - active

    def with_key(self, name: str, key: PublicKey, since: str) -> "Roster":
        """Make `key` the only active key of `name`."""
        kept = self.without(name, since).entries
        entry = Entry(name=name, key=key, state=StoreState.ACTIVE, since=since)
        return Roster(number=self.number + 1, entries=(*kept, entry))

    def without(self, name: str, since: str) -> "Roster":
        """Revoke the active key of `name`."""

        def revoked(entry: Entry) -> Entry:
            matches = entry.name == name and entry.state is StoreState.ACTIVE
            return replace(entry, state=StoreState.REVOKED, since=since) if matches else entry

        return Roster(number=self.number + 1, entries=tuple(map(revoked, self.entries)))

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
            IdentityError: it is damaged, or not signed by that key.
        """
        try:
            fields = json.loads(text)
            signature = bytes_of(fields.pop("signature"))
            entries = tuple(
                Entry(name=e["name"], key=PublicKey(e["key"]), state=StoreState(e["state"]), since=e["since"])
                for e in fields["stores"]
            )
            if chain.verifies(signature, _content(fields)):
                return cls(number=int(fields["number"]), entries=entries)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        raise IdentityError("the roster is damaged, or not signed by this chain's key: restore it from a backup")


def _as_json(entries: Iterable[Entry]) -> list[dict[str, str]]:
    return [{"name": e.name, "key": e.key.text, "state": e.state.value, "since": e.since} for e in entries]


def _content(fields: Mapping[str, Any]) -> bytes:
    return _CONTEXT + json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
