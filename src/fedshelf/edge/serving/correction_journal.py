"""The journal of a store's corrections: one JSON line for each change, in a hash chain, and what follows from them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from fedshelf.storage.hash_chain import HashChain, timestamp


class Status(StrEnum):
    """What became of a correction."""

    TRAINING = "training"  # among the training photos
    INBOX = "inbox"  # its product is unknown
    REVIEW = "review"  # waits for a person
    UNDONE = "undone"
    REJECTED = "rejected"
    REPLACED = "replaced"  # by a later correction of the same photo


WAITING = frozenset({Status.INBOX, Status.REVIEW})
ACTIVE = WAITING | {Status.TRAINING}


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """A correction.

    Attributes:
        id: identifies it.
        time: when it was made.
        product: the product, as the model or the store's folders name it; in the inbox, as it was typed.
        status: what became of it.
        path: where its photo lies, relative to the data folder.
        destination: the folder for it among the training photos, relative to the data folder; empty if there is none.
        source: SHA-256 of the photo as it was sent (hex).
        photo: SHA-256 of the photo as it is kept (hex).
        reason: why it is held for review; empty if it is not.
        predicted: the model's first guess; empty if there was none.
        probability: the probability of that guess.
    """

    id: str
    time: str
    product: str
    status: Status
    path: str
    destination: str
    source: str
    photo: str
    reason: str = ""
    predicted: str = ""
    probability: float = 0.0


class Journal:
    """The journal in one file. The caller holds a lock while it reads or appends.

    Args:
        path: the file.

    Attributes:
        known: the corrections by id, oldest first.
    """

    def __init__(self, path: Path) -> None:
        self.known: dict[str, Correction] = {}
        self._path = path
        self._chain = HashChain(path, noun="correction")

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return 0

    def read(self) -> dict[str, str]:
        """Read the whole file; a last line that a crash has left incomplete is removed.

        Returns:
            The ids of all corrections, each with the path at which its photo was before its last change; empty if it
            was staged.

        Raises:
            RunError: the file cannot be read, or was altered.
        """
        before: dict[str, str] = {}
        self.known = {}
        self._chain.drop_incomplete_line()
        for event in self._chain.lines():
            before |= self._apply(event)
        return before

    def append(self, event: Mapping[str, Any]) -> dict[str, str]:
        """Write a line and sync it.

        Returns:
            The changed corrections; see `read`.

        Raises:
            RunError: the disk is full, ...; the file is unchanged.
        """
        self._chain.append(event)
        return self._apply({"time": timestamp(), **event})

    def _apply(self, event: Mapping[str, Any]) -> dict[str, str]:
        changed, known = str(event["id"]), self.known
        match event["event"]:
            case "filed":
                known[changed] = _parse(event)
                replaced = {other: known[other].path for other in event["replaces"]}
                known.update({other: replace(known[other], status=Status.REPLACED) for other in replaced})
                return {changed: "", **replaced}
            case "accepted":
                moved_from = known[changed].path
                known[changed] = replace(known[changed], status=Status.TRAINING, path=event["path"])
                return {changed: moved_from}
            case "undone" | "rejected":
                known[changed] = replace(known[changed], status=Status(event["event"]))
        return {changed: known[changed].path}


def fields_of(correction: Correction) -> dict[str, Any]:
    """What the journal says of a new correction."""
    fields = {name: getattr(correction, name) for name in Correction.__slots__ if name != "time"}
    return {**fields, "status": correction.status.value}


def _parse(event: Mapping[str, Any]) -> Correction:
    fields = {name: event[name] for name in Correction.__slots__}
    return Correction(**{**fields, "status": Status(event["status"])})
