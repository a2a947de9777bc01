"""A store's ledger: what left the store, when, under which protections, and at what cost to privacy.

A release is written and synced as `intended` before its bytes go, and as `sent` once they have arrived. So what left is
never more than the ledger says, and the ledger claims at most the one release in flight too much. The same bytes, sent
again, are one release.

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
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedshelf.core.errors import RunError
from fedshelf.identity.countersignatures import Countersignature, head_of
from fedshelf.storage.atomic_files import translating_os_errors, write_atomically
from fedshelf.storage.hash_chain import START, DamagedLogError, HashChain, Head, timestamp

if TYPE_CHECKING:  # the crash reporter imports this module, and not torch
    from fedshelf.core.messages import ClientMessage, TaskKey
    from fedshelf.core.ports import ReleaseTerms
    from fedshelf.serialization.blob import Buffer

logger = logging.getLogger(__name__)

FILE, HEAD_FILE = "ledger.jsonl", "ledger-head.json"
INTENDED, SENT, REMOVED = "intended", "sent", "incomplete line removed"
_PURPOSES = {
    "join": "join", "ready": "setup", "upload": "train", "evaluation": "evaluate", "comparison": "compare",
    "maskingreply": "masking"}  # fmt: skip
_NO_HEAD = Head(number=0, hash=START)


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """One answer that left the store, or was about to.

    Attributes:
        number: its entry in the ledger; 0 before it is written.
        time: when it was written, before it was sent.
        kind: the kind of message, such as `upload`; `crash report` for what the crash reporter sends.
        purpose: what it is for: `join`, `setup`, `train`, `closed-form`, `evaluate`, `compare`, `crash`, or `failure`
            if that is unknown.
        run_id: the run; "" if it names none.
        round: the round, or None.
        attempt: the attempt at the round, or None.
        num_bytes: the message's bytes: header and blob.
        digest: SHA-256 of these bytes.
        blob: the blob's BLAKE3 digest, by which the server's audit log names an upload; "" for none.
        protections: what limits how much it reveals, such as `clip-norm 1`.
        mechanism: see `ReleaseTerms.mechanism`.
        epsilon: see `ReleaseTerms.epsilon`.
        is_sent: whether the other side has it for certain. Otherwise it may have it.
    """

    number: int = 0
    time: str = ""
    kind: str
    purpose: str
    run_id: str = ""
    round: int | None = None
    attempt: int | None = None
    num_bytes: int
    digest: str
    blob: str = ""
    protections: tuple[str, ...] = ()
    mechanism: Mapping[str, object] | None = None
    epsilon: float | None = None
    is_sent: bool = False


_WRITTEN = tuple(name for name in Release.__slots__ if name not in ("number", "time", "is_sent"))


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
        self._chain, self._folder = HashChain(self.path), folder
        self._declared: tuple[ClientMessage, ReleaseTerms] | None = None
        removed = self._chain.drop_incomplete_line()
        found = read(folder, strictly=False)
        self.head, self._known, self._countersigned = found.head, found.by_digest, dict(found.countersigned)
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

    def declare(self, reply: ClientMessage, terms: ReleaseTerms) -> None:
        """Note what is known of a reply that is about to be sent. See `rounds.client.Client`."""
        self._declared = reply, terms

    def intend(self, message: object, payload: Iterable[Buffer], *, blob: str = "") -> Release:
        """Write down a message before any of its bytes leave.

        Args:
            message: the message.
            payload: exactly the bytes that are sent.
            blob: digest of its blob; "" for none.

        Returns:
            The release; one that is known already if these bytes were sent before.

        Raises:
            RunError: the ledger cannot be written, and nothing may leave.
        """
        key, kind = getattr(message, "key", None), type(message).__name__.lower()
        release = Release(
            kind=kind, purpose=_PURPOSES.get(kind, "failure"), blob=blob, **_measured(payload),
            run_id=key.run_id if key else getattr(message, "run_id", ""), round=key and key.round,
            attempt=key and key.attempt,
        )  # fmt: skip
        if self._declared is not None:
            reply, terms = self._declared
            if type(reply) is type(message) and getattr(reply, "key", None) == key:
                release = replace(
                    release, purpose=terms.purpose, protections=terms.protections, mechanism=terms.mechanism,
                    epsilon=terms.epsilon,
                )  # fmt: skip
        return self._intend(release)

    def intend_crash_report(self, content: bytes) -> Release:
        """Write down a crash report before it is sent.

        Raises:
            RunError: the ledger cannot be written, and nothing may leave.
        """
        return self._intend(Release(kind="crash report", purpose="crash", **_measured([content])))

    def confirm(self, release: Release | None, countersignature: Countersignature | None = None) -> None:
        """Write down that a release has arrived, and keep what the server has signed.

        Args:
            release: from `intend`; None for an answer that tells nothing.
            countersignature: the server's, of a head of this ledger; its signature has been verified.

        Raises:
            RunError: the ledger cannot be written.
        """
        if release is not None and not release.is_sent:
            signed = {"countersignature": dict(countersignature.fields)} if countersignature else {}
            self._append({"event": SENT, "entry": release.number, "digest": release.digest, **signed})
            self._known[release.digest] = replace(release, is_sent=True)
        elif countersignature is None:
            return
        if countersignature is not None:
            known = self._countersigned.get(countersignature.chain)
            self._countersigned[countersignature.chain] = countersignature
            if countersignature.before not in (_NO_HEAD, known and known.head):
                self._check()
        signed_heads = [dict(found.fields) for found in self._countersigned.values()]
        write_atomically(self._folder / HEAD_FILE, json.dumps({**asdict(self.head), "countersignatures": signed_heads}))

    def _intend(self, release: Release) -> Release:
        known = self._known.get(release.digest)
        if known is not None:
            return known
        fields = {name: getattr(release, name) for name in _WRITTEN}
        try:
            self._append({"event": INTENDED, **fields})
        except RunError as error:
            raise type(error)(
                f"nothing is sent, because it cannot be written to this store's ledger: {error}"
            ) from error
        self._known[release.digest] = release = replace(release, number=self.head.number, time=timestamp())
        return release

    def _append(self, fields: Mapping[str, Any]) -> None:
        self.head = self._chain.append(fields)

    def _check(self) -> None:
        """Report if a server has seen an entry that is not here."""
        try:
            read(self._folder)
        except DamagedLogError as error:
            logger.error("%s", error)


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What a ledger says, read and checked.

    Attributes:
        releases: in order.
        head: the newest entry.
        countersigned: each chain's newest countersignature, by the chain's key.
        num_removed: incomplete lines that were removed, after power cuts.
    """

    releases: tuple[Release, ...]
    head: Head
    countersigned: Mapping[str, Countersignature]
    num_removed: int

    @property
    def by_purpose(self) -> dict[str, list[Release]]:
        """The releases by purpose."""
        found: dict[str, list[Release]] = {}
        for release in self.releases:
            found.setdefault(release.purpose, []).append(release)
        return found

    @property
    def by_digest(self) -> dict[str, Release]:
        """The releases by digest."""
        return {release.digest: release for release in self.releases}


def read(folder: Path, *, strictly: bool = True) -> Content:
    """Read a ledger, and check that it is as it was written.

    Args:
        folder: the store's state directory.
        strictly: check all countersignatures, and that no server has seen an entry that is missing. Otherwise only that
            the entries are those that this store has written.

    Returns:
        Its content.

    Raises:
        RunError: it cannot be read.
        DamagedLogError: an entry was altered, moved or removed; the message names the first one.
    """
    path = folder / FILE
    end, newest = _kept(folder / HEAD_FILE)
    releases: dict[int, Release] = {}
    head, hashes, signed, num_removed = _NO_HEAD, [START], list(newest.values()), 0
    for head, line in HashChain(path).entries(end):
        number = head.number
        hashes.append(head.hash)
        try:
            match line["event"]:
                case "intended":
                    fields = {name: line[name] for name in _WRITTEN}
                    fields["protections"] = tuple(fields["protections"])
                    releases[number] = Release(number=number, time=line["time"], **fields)
                case "sent":
                    releases[line["entry"]] = replace(releases[line["entry"]], is_sent=True)
                    if "countersignature" in line:
                        signed.append(_signed(line["countersignature"], check=strictly))
                case "incomplete line removed":
                    num_removed += 1
                case _:
                    raise KeyError
        except (KeyError, TypeError, ValueError):
            raise _damaged(path, number, "is not one that FedShelf writes") from None
    wanted = [(found.head, "that the server has countersigned") for found in signed]
    wanted += [(found.before, "that the server had seen before") for found in signed if strictly]
    for known, which in sorted([*wanted, (end, "of the last release")], key=lambda item: item[0].number):
        if known.number > head.number:
            raise _damaged(
                path, head.number + 1, f"is missing: entry {known.number} is the newest one {which}, and the file ends "
                f"at entry {head.number}",
            )  # fmt: skip
        if hashes[known.number] != known.hash:
            raise _damaged(path, known.number, f"is not the one {which}: it, or one before, was altered")
    return Content(releases=tuple(releases.values()), head=head, countersigned=newest, num_removed=num_removed)


def _kept(path: Path) -> tuple[Head, dict[str, Countersignature]]:
    """Read the file with the newest head and countersignatures."""
    with translating_os_errors("read", path):
        try:
            fields = json.loads(path.read_bytes())
            signed = [_signed(one) for one in fields["countersignatures"]]
            return head_of(fields), {found.chain: found for found in signed}
        except FileNotFoundError:
            return _NO_HEAD, {}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise DamagedLogError(
                f"'{path}' was altered: it has the newest entry of this store's ledger, and what servers have "
                "countersigned. Keep it as evidence, and restore it from a backup"
            ) from None


def _signed(fields: object, *, check: bool = True) -> Countersignature:
    found = Countersignature.of(fields)
    if check and not found.is_signed:
        raise ValueError("the countersignature is wrong")
    return found


def _measured(payload: Iterable[Buffer]) -> dict[str, Any]:
    hasher, num_bytes = hashlib.sha256(), 0
    for piece in payload:
        hasher.update(piece)
        num_bytes += len(piece)
    return {"digest": hasher.hexdigest(), "num_bytes": num_bytes}


def _damaged(path: Path, number: int, problem: str) -> DamagedLogError:
    return DamagedLogError(
        f"'{path}': entry {number} {problem}. Keep the file as evidence, and find out who could write to it. To take "
        "part again, restore it from a backup; or get a token by 'fedshelf enroll rotate', and give a new --state-dir"
    )
