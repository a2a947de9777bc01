"""The heads of the stores' ledgers, as a server has seen them.

A store shows the head of its ledger with each answer, and the server signs it. Neither can take it back: the store has
the signature, and the server has the head in its audit log. What the server signs names the newest line of that log, so
the two chains are anchored in each other.
"""

import datetime
import hashlib
import json
import logging
import re
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedshelf.core.errors import RunError
from fedshelf.core.text import printable
from fedshelf.identity.audit_log import AuditLog
from fedshelf.identity.keys import KeyPair, PublicKey, bytes_of, text_of
from fedshelf.storage.atomic_files import make_own_folder, translating_os_errors, write_atomically
from fedshelf.storage.hash_chain import START, Head

logger = logging.getLogger(__name__)

_CONTEXT = "fedshelf ledger 1"
_HASH = re.compile(r"[0-9a-f]{64}")
_MAX_NUMBER = 1 << 53
_NO_HEAD = Head(number=0, hash=START)


@dataclass(frozen=True, kw_only=True, slots=True)
class Countersignature:
    """A server's statement that it has seen the head of a store's ledger.

    Attributes:
        chain: the chain's key, which signs.
        store: the key of the store that showed it.
        head: the head.
        before: the head that the same key showed before; number 0 if there is none.
        time: when the server saw it.
        audit: hash of the newest line of the server's audit log, which names the head; "" if that cannot be read.
        signature: over all other fields.
    """

    chain: str
    store: str
    head: Head
    before: Head
    time: str
    audit: str
    signature: str = ""

    @classmethod
    def of(cls, fields: Any) -> "Countersignature":
        """Read `fields`.

        Raises:
            ValueError: they are not a countersignature.
        """
        try:
            texts = {name: str(fields[name]) for name in ("chain", "store", "time", "audit", "signature")}
            return cls(head=head_of(fields["head"]), before=head_of(fields["before"]), **texts)
        except (KeyError, TypeError) as error:
            raise ValueError("not a countersignature") from error

    @property
    def is_signed(self) -> bool:
        """Whether the signature is that of `chain`."""
        try:
            signature = bytes_of(self.signature)
            return text_of(signature) == self.signature and PublicKey(self.chain).verifies(signature, self._content())
        except ValueError:
            return False

    @property
    def fields(self) -> Mapping[str, Any]:
        """As JSON values."""
        return asdict(self)

    def signed(self, keys: KeyPair) -> "Countersignature":
        """A copy with the chain's signature."""
        return replace(self, signature=text_of(keys.sign(self._content())))

    def _content(self) -> bytes:
        lines = (
            _CONTEXT, self.chain, self.store, f"{self.head.number}", self.head.hash, f"{self.before.number}",
            self.before.hash, self.time, self.audit,
        )  # fmt: skip
        return "\n".join(lines).encode()


def head_of(fields: Any) -> Head:
    """Read a head.

    Raises:
        ValueError: it is not one.
    """
    match fields:
        case {"number": int(number), "hash": str(hash)} if 0 <= number <= _MAX_NUMBER and _HASH.fullmatch(hash):
            return Head(number=number, hash=hash)
    raise ValueError("not the head of a ledger")


class LedgerHeads:
    """The newest head of each store's ledger, in a folder of the server. Thread-safe.

    Args:
        folder: created when the first head is seen.
        keys: the chain's keys.
        audit: the audit log, which gets each head.
    """

    def __init__(self, folder: Path, keys: KeyPair, audit: AuditLog) -> None:
        self._folder = folder
        self._keys = keys
        self._audit = audit
        self._lock = threading.Lock()

    def countersign(self, store: str, key: PublicKey, shown: object) -> Countersignature | None:
        """Keep the head that a store shows, and sign it. A head that does not follow the one before is reported.

        Args:
            store: the store's name.
            key: its key.
            shown: ``{"number": …, "hash": …}``; None from a store without a ledger.

        Returns:
            The countersignature; None if there is nothing to sign, or it cannot be kept.
        """
        try:
            head = head_of(shown)
            with self._lock:
                known, before = self._newest(store)
                if head != before:
                    self._save(store, key, head, before)
                audit = self._audit.head().hash
        except ValueError:
            return None
        except RunError as error:
            logger.error("the head of the ledger of '%s' is not countersigned: %s", printable(store), error)
            return None
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        return Countersignature(
            chain=self._keys.public.text,
            store=key.text,
            head=head,
            time=time,
            audit=audit,
            before=before if known == key.text else _NO_HEAD,
        ).signed(self._keys)

    def _save(self, store: str, key: PublicKey, head: Head, before: Head) -> None:
        if head.number <= before.number:
            event = "ledger went back" if head.number < before.number else "ledger forked"
            logger.warning(
                "the ledger of '%s' %s: it ended at entry %d before, and now at %d. Entries were removed or changed, "
                "or an old copy was restored: 'fedshelf privacy ledger --verify' in the store names the first",
                printable(store), event.removeprefix("ledger "), before.number, head.number,
            )  # fmt: skip
            self._audit.write(event, store=store, entry=head.number, hash=head.hash, known=before.number)
        else:
            self._audit.write("ledger", store=store, entry=head.number, hash=head.hash)
        make_own_folder(self._folder)
        write_atomically(
            self._path(store), json.dumps({"store": store, "key": key.text, **asdict(head)}), durable=False
        )

    def _newest(self, store: str) -> tuple[str, Head]:
        """The key that the store had when it showed its newest head, and that head."""
        path = self._path(store)
        with translating_os_errors("read", path):
            try:
                fields = json.loads(path.read_text(encoding="utf-8"))
                return str(fields["key"]), head_of(fields)
            except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):  # the audit log has it, too
                return "", _NO_HEAD

    def _path(self, store: str) -> Path:
        return self._folder / f"{hashlib.sha256(store.encode()).hexdigest()[:32]}.json"
