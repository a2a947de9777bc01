"""A store's ledger: what left the store, when, under which protections, and at what cost to privacy.

A release is written and synced as `intended` before its bytes go, and as `sent` once they have arrived. So what left is
never more than the ledger says, and the ledger claims at most the one release in flight too much. The same bytes, sent
again to the same server, are one release.

    ledger.jsonl       a hash chain (`storage.hash_chain`) of three kinds of lines: a release that is intended; the
                       number of one that was sent, with the server's countersignature; that an incomplete line was
                       removed
    ledger-head.json   the newest line after the last release, and each server's newest countersignature

One ledger serves all runs and servers of a store. It proves nothing to somebody who does not trust the store's
administrator, who can replace both files: for that, the server keeps the heads that it has countersigned.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedshelf.core.errors import RunError
from fedshelf.identity.countersignatures import Countersignature
from fedshelf.privacy.ledger_content import (
    FILE,
    HEAD_FILE,
    INTENDED,
    NO_HEAD,
    REMOVED,
    SENT,
    WRITTEN,
    Recipient,
    Release,
    bounded,
    chain_of,
    epsilon_text,
    read,
)
from fedshelf.storage.atomic_files import write_atomically
from fedshelf.storage.hash_chain import timestamp

if TYPE_CHECKING:  # the crash reporter imports this module, and not torch
    from fedshelf.core.messages import ClientMessage, TaskKey
    from fedshelf.core.ports import ReleaseTerms
    from fedshelf.serialization.blob import Buffer

_PURPOSES = {
    "join": "join", "ready": "setup", "upload": "train", "evaluation": "evaluate", "comparison": "compare",
    "maskingreply": "masking", "encryptionreply": "encryption"}  # fmt: skip
_UNKNOWN = Recipient()


class Ledger:
    """The ledger of one store, open to be written. For one process and one thread.

    Args:
        folder: the store's state directory.

    Attributes:
        path: the file.
        head: its newest entry.

    Raises:
        RunError: the ledger cannot be read, or was altered (`DamagedLogError`).
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._chain, self._folder = chain_of(folder), folder
        self._declared: tuple[ClientMessage, ReleaseTerms, float | None] | None = None
        removed = self._chain.drop_incomplete_line()
        found = read(folder, strictly=False)
        self.head, self._countersigned = found.head, dict(found.countersigned)
        self._known = {release.identity: release for release in found.releases}
        if removed:
            self._append({"event": REMOVED, "num_bytes": removed})

    @property
    def releases(self) -> Iterable[Release]:
        """What has left the store, or was about to."""
        return self._known.values()

    def has_left(self, key: TaskKey) -> bool:
        """Whether an upload for the task has left the store, or was about to."""
        task = ("upload", key.run_id, key.round, key.attempt)
        return any((known.kind, known.run_id, known.round, known.attempt) == task for known in self.releases)

    def declare(self, reply: ClientMessage, terms: ReleaseTerms, *, delta: float | None = None) -> None:
        """Note what is known of a reply that is about to be sent. See `rounds.client.Client`.

        Args:
            reply: the reply.
            terms: what is known of it.
            delta: δ, for which its ε holds.
        """
        self._declared = reply, terms, delta

    def intend(
        self, message: object, payload: Iterable[Buffer], *, blob: str = "", to: Recipient = _UNKNOWN
    ) -> Release:
        """Write down a message before any of its bytes leave.

        Args:
            message: the message.
            payload: exactly the bytes that are sent.
            blob: digest of its blob; "" for none.
            to: who gets it.

        Returns:
            The release; one that is known already if this recipient was sent these bytes before.

        Raises:
            RunError: the ledger cannot be written, and nothing may leave.
        """
        key, kind, delta = getattr(message, "key", None), type(message).__name__.lower(), None
        kind = "refusal" if getattr(message, "refused", False) else kind
        release = Release(
            kind=kind, purpose=_PURPOSES.get(kind, "failure"), blob=blob, **_measured(payload), **asdict(to),
            run_id=key.run_id if key else getattr(message, "run_id", ""), round=key and key.round,
            attempt=key and key.attempt,
        )  # fmt: skip
        if self._declared is not None:
            reply, terms, said = self._declared
            if type(reply) is type(message) and getattr(reply, "key", None) == key:
                delta = said
                release = replace(
                    release, purpose=terms.purpose, protections=terms.protections, mechanism=terms.mechanism,
                    epsilon=terms.epsilon,
                )  # fmt: skip
        return self._intend(bounded(release, delta))

    def intend_crash_report(self, content: bytes, to: Recipient) -> Release:
        """Write down a crash report before it is sent.

        Args:
            content: the report.
            to: who gets it.

        Raises:
            RunError: the ledger cannot be written, and nothing may leave.
        """
        return self._intend(Release(kind="crash report", purpose="crash", **_measured([content]), **asdict(to)))

    def confirm(self, release: Release | None, countersignature: Countersignature | None = None) -> None:
        """Write down that a release has arrived, and keep what the server has signed.

        Args:
            release: from `intend`; None for an answer that tells nothing.
            countersignature: the server's, of a head of this ledger; its signature has been verified.

        Raises:
            RunError: the ledger cannot be written.
            DamagedLogError: the server has seen an entry that is not here.
        """
        if release is not None and not release.is_sent:
            signed = {"countersignature": dict(countersignature.fields)} if countersignature else {}
            self._append({"event": SENT, "entry": release.number, "digest": release.digest, **signed})
            self._known[release.identity] = replace(release, is_sent=True)
        elif countersignature is None:
            return
        if countersignature is None:
            self._keep_head()
            return
        known = self._countersigned.get(countersignature.chain)
        self._countersigned[countersignature.chain] = countersignature
        self._keep_head()
        if countersignature.before not in (NO_HEAD, known and known.head):
            read(self._folder)

    def _intend(self, release: Release) -> Release:
        known = self._known.get(release.identity)
        if known is not None:
            return known
        fields = {name: getattr(release, name) for name in WRITTEN} | {"epsilon": epsilon_text(release.epsilon)}
        try:
            if not self.head.number:
                self._keep_head()  # so that its absence shows
            self._append({"event": INTENDED, **fields})
        except RunError as error:
            raise type(error)(
                f"nothing is sent, because it cannot be written to this store's ledger: {error}"
            ) from error
        self._known[release.identity] = release = replace(release, number=self.head.number, time=timestamp())
        return release

    def _append(self, fields: Mapping[str, Any]) -> None:
        self.head = self._chain.append(fields)

    def _keep_head(self) -> None:
        signed = [dict(found.fields) for found in self._countersigned.values()]
        write_atomically(self._folder / HEAD_FILE, json.dumps({**asdict(self.head), "countersignatures": signed}))


def _measured(payload: Iterable[Buffer]) -> dict[str, Any]:
    hasher, num_bytes = hashlib.sha256(), 0
    for piece in payload:
        hasher.update(piece)
        num_bytes += len(piece)
    return {"digest": hasher.hexdigest(), "num_bytes": num_bytes}
