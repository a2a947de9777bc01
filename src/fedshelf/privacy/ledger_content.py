"""What a store's ledger says, read and checked. See `privacy.ledger`, which writes it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from fedshelf.identity.countersignatures import Countersignature, head_of
from fedshelf.storage.atomic_files import translating_os_errors
from fedshelf.storage.hash_chain import START, DamagedLogError, HashChain, Head

_Key = TypeVar("_Key")

FILE, HEAD_FILE = "ledger.jsonl", "ledger-head.json"
INTENDED, SENT, REMOVED = "intended", "sent", "incomplete line removed"
NO_HEAD = Head(number=0, hash=START)
REMEDY = (
    "Keep the file as evidence, and find out who could write to it. To take part again, restore it from a backup; or "
    "get a token by 'fedshelf enroll rotate', and give a new --state-dir"
)
_FROM_PHOTOS = frozenset({"upload", "evaluation", "comparison"})
_TRACES = ("accepted-tasks.jsonl", "setup.json", "model.safetensors", "model", "rounds/*")
"""In a state directory: what a client leaves there only after its first release."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipient:
    """Who gets a release.

    Attributes:
        server: HOST:PORT; "" if it is not known, on stock Flower.
        chain: the chain's key, as in a policy's `roster-key`; "" if the store is not enrolled.
    """

    server: str = ""
    chain: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """One answer that left the store, or was about to.

    Attributes:
        number: its entry in the ledger; 0 before it is written.
        time: when it was written, before it was sent.
        kind: the kind of message, such as `upload`; `refusal` if the store's policy did not allow the task; `crash
            report` for what the crash reporter sends.
        purpose: what it is for: `join`, `setup`, `train`, `closed-form`, `evaluate`, `compare`, `crash`, or `failure`
            if that is unknown.
        run_id: the run; "" if it names none.
        round: the round, or None.
        attempt: the attempt at the round, or None.
        num_bytes: the message's bytes: header and blob.
        digest: SHA-256 of these bytes.
        blob: the blob's BLAKE3 digest, by which the server's audit log names an upload; "" for none.
        server: see `Recipient`.
        chain: see `Recipient`.
        protections: what limits how much it reveals, such as `clip-norm 1`.
        mechanism: see `ReleaseTerms.mechanism`.
        epsilon: the privacy loss of the photos so far, with this release: infinite if it was computed from photos
            without noise; None if no photo has a part in it.
        delta: δ, for which `epsilon` holds; None without one, and in entries of older versions.
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
    server: str = ""
    chain: str = ""
    protections: tuple[str, ...] = ()
    mechanism: Mapping[str, object] | None = None
    epsilon: float | None = None
    delta: float | None = None
    is_sent: bool = False

    @property
    def is_from_photos(self) -> bool:
        """Whether it was computed from photos; other kinds tell counts, names, and why something failed."""
        return self.kind in _FROM_PHOTOS

    @property
    def is_bare(self) -> bool:
        """Whether it was computed from photos without noise."""
        return self.is_from_photos and self.mechanism is None

    @property
    def identity(self) -> tuple[str, str, str]:
        """What it has in common with the same bytes, sent again to the same recipient."""
        return self.digest, self.server, self.chain


WRITTEN = tuple(name for name in Release.__slots__ if name not in ("number", "time", "is_sent"))
_LATER = frozenset({"server", "chain", "delta"})  # older entries do not have these


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
        return _grouped(self.releases, lambda release: release.purpose)

    @property
    def by_recipient(self) -> dict[Recipient, list[Release]]:
        """The releases by recipient."""
        return _grouped(self.releases, lambda release: Recipient(server=release.server, chain=release.chain))


def read(folder: Path, *, strictly: bool = True) -> Content:
    """Read a ledger, and check that it is as it was written.

    Args:
        folder: the store's state directory.
        strictly: check the signatures of all countersignatures. Otherwise only of each chain's newest one.

    Returns:
        Its content.

    Raises:
        RunError: it cannot be read.
        DamagedLogError: an entry was altered, moved or removed; the message names the first one. Or one of its files is
            missing.
    """
    path = folder / FILE
    kept = _kept(folder / HEAD_FILE)
    end, newest = kept or (NO_HEAD, {})
    releases: dict[int, Release] = {}
    head, hashes, signed, num_removed = NO_HEAD, [START], list(newest.values()), 0
    for head, line in chain_of(folder).entries(end):
        number = head.number
        hashes.append(head.hash)
        try:
            match line["event"]:
                case "intended":
                    releases[number] = _release(number, line)
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
    wanted += [(found.before, "that the server had seen before") for found in signed]
    for known, which in sorted([*wanted, (end, "of the last release")], key=lambda item: item[0].number):
        if known.number > head.number:
            raise _damaged(
                path, head.number + 1, f"is missing: entry {known.number} is the newest one {which}, and the file ends "
                f"at entry {head.number}",
            )  # fmt: skip
        if hashes[known.number] != known.hash:
            raise _damaged(path, known.number, f"is not the one {which}: it, or one before, was altered")
    if head.number and kept is None:
        last = max((found.head.number for found in signed), default=0)
        raise DamagedLogError(
            f"'{folder / HEAD_FILE}' is missing, so that entries removed at the end of '{path}' do not show: it has "
            f"{head.number} entries, countersigned up to entry {last}. {REMEDY}"
        )
    trace = next((found for pattern in _TRACES for found in folder.glob(pattern)), None)
    if not head.number and trace is not None:
        raise DamagedLogError(
            f"'{path}' is missing, although something has left this store: '{trace}' is there. {REMEDY}"
        )
    for found in signed:
        if found.head.number >= newest.get(found.chain, found).head.number:
            newest[found.chain] = found
    return Content(releases=tuple(releases.values()), head=head, countersigned=newest, num_removed=num_removed)


def chain_of(folder: Path) -> HashChain:
    """The hash chain of the ledger in a state directory."""
    return HashChain(folder / FILE, noun="entry", advice=REMEDY)


class OtherLedgers:
    """The ledgers of other state directories. Each is read again only when it has changed.

    Args:
        folders: returns the state directories.
    """

    def __init__(self, folders: Callable[[], Iterable[Path]]) -> None:
        self._folders = folders
        self._read: dict[Path, tuple[int, tuple[Release, ...]]] = {}

    def releases(self) -> Mapping[Path, tuple[Release, ...]]:
        """What has left, by state directory.

        Raises:
            RunError: one of them cannot be read, or was altered.
        """
        folders = list(self._folders())
        for folder in folders:
            path = folder / FILE
            with translating_os_errors("read", path):
                size = path.stat().st_size if path.exists() else 0
            if folder not in self._read or self._read[folder][0] != size:
                self._read[folder] = size, read(folder, strictly=False).releases
        return {folder: self._read[folder][1] for folder in folders}


def epsilon_text(epsilon: float | None) -> float | str | None:
    """ε as a value for JSON, which has no infinity: `"inf"`."""
    return "inf" if epsilon == math.inf else epsilon


def bounded(release: Release, delta: float | None) -> Release:
    """A copy with the δ of its ε, which is infinite if the release was computed from photos without noise."""
    epsilon = math.inf if release.is_bare else release.epsilon
    return replace(release, epsilon=epsilon, delta=None if epsilon is None else delta)


def _grouped(releases: Iterable[Release], key: Callable[[Release], _Key]) -> dict[_Key, list[Release]]:
    found: dict[_Key, list[Release]] = {}
    for release in releases:
        found.setdefault(key(release), []).append(release)
    return found


def _release(number: int, line: Mapping[str, Any]) -> Release:
    fields = {name: line[name] for name in WRITTEN if name in line or name not in _LATER}
    fields["protections"] = tuple(fields["protections"])
    fields["epsilon"] = None if fields["epsilon"] is None else float(fields["epsilon"])
    release = Release(number=number, time=line["time"], **fields)
    return bounded(release, release.delta)


def _kept(path: Path) -> tuple[Head, dict[str, Countersignature]] | None:
    """Read the file with the newest head and countersignatures; None if there is none."""
    with translating_os_errors("read", path):
        try:
            fields = json.loads(path.read_bytes())
            signed = [_signed(one) for one in fields["countersignatures"]]
            return head_of(fields), {found.chain: found for found in signed}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise DamagedLogError(
                f"'{path}' was altered: it has the newest entry of this store's ledger, and what servers have "
                f"countersigned. {REMEDY}"
            ) from None


def _signed(fields: object, *, check: bool = True) -> Countersignature:
    found = Countersignature.of(fields)
    if check and not found.is_signed:
        raise ValueError("the countersignature is wrong")
    return found


def _damaged(path: Path, number: int, problem: str) -> DamagedLogError:
    return DamagedLogError(f"'{path}': entry {number} {problem}. {REMEDY}")
