"""An append-only log of JSON lines in which each line holds the hash of the line before.

A line that is altered, inserted or removed breaks the chain. Cutting off the end does not: somebody else has to keep a
copy of the newest hash to notice that.

    {"number": 3, "time": "2026-11-30T12:00:00.000Z", "event": …, "before": HASH}

The hash of a line is SHA-256 over its bytes, without the line break.
"""

import datetime
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedshelf.core.errors import RunError
from fedshelf.storage.atomic_files import open_private, sync_folder, translating_os_errors

START = "0" * 64
"""What the first line has as the hash of the line before."""
_TAIL = 1 << 16  # bytes that hold the last line: longer ones are not written
_MOST_CHARACTERS = 1 << 14
_OWN = frozenset({"number", "time", "before"})


def timestamp() -> str:
    """The time, as lines have it: `2026-11-30T12:00:00.000Z`."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class DamagedLogError(RunError):
    """A line of a log is not the successor of the one before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The end of a chain.

    Attributes:
        number: number of the newest line; 0 if there is none.
        hash: its hash.
    """

    number: int
    hash: str


class HashChain:
    """A log file. Several processes may append to it.

    Args:
        path: created with mode 0600 when the first line is written.
        noun: what its errors call a line.
        advice: what they say to do.
    """

    def __init__(
        self, path: Path, *, noun: str = "line",
        advice: str = "Keep the file as evidence, and find out who could write to it",
    ) -> None:  # fmt: skip
        self._path = path
        self._noun, self._advice = noun, advice

    def append(self, fields: Mapping[str, Any]) -> Head:
        """Write a line and sync it to the disk.

        Args:
            fields: JSON values; `number`, `time` and `before` are added.

        Returns:
            The new end.

        Raises:
            RunError: the file cannot be written, or its last line is not whole.
        """
        if taken := _OWN & fields.keys():
            raise ValueError(f"every line of a log has {', '.join(sorted(taken))} of its own")
        with translating_os_errors("write", self._path):
            descriptor = open_private(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                before = self._head(_tail(descriptor))
                time = timestamp()
                line = json.dumps({"number": before.number + 1, "time": time, **fields, "before": before.hash})
                if len(line) > _MOST_CHARACTERS:
                    raise ValueError(f"a line of {len(line):,} characters is too long for a log")
                written = line.encode()
                _write_line(descriptor, written + b"\n")
                if not before.number:
                    sync_folder(self._path.parent)
            finally:
                os.close(descriptor)
        return Head(number=before.number + 1, hash=_hash(written))

    def head(self) -> Head:
        """The end of the chain.

        Raises:
            RunError: the file cannot be read, or its last line is not whole.
        """
        with translating_os_errors("read", self._path):
            try:
                descriptor = open_private(self._path, os.O_RDONLY)
            except FileNotFoundError:
                return Head(number=0, hash=START)
            try:
                return self._head(_tail(descriptor))
            finally:
                os.close(descriptor)

    def lines(self) -> Iterator[Mapping[str, Any]]:
        """Read all lines, and check that they form a chain; see `entries`."""
        return (fields for _, fields in self.entries())

    def entries(self, known: Head | None = None) -> Iterator[tuple[Head, Mapping[str, Any]]]:
        """Read all lines, each with its number and hash, and check that they form a chain.

        Args:
            known: a line that somebody has kept, to tell which of two lines was altered.

        Raises:
            RunError: the file cannot be read, or a line is not the successor of the one before; the message has the
                number of the first bad line.
        """
        number, before = 0, START
        with translating_os_errors("read", self._path):
            try:
                file = self._path.open("rb")
            except FileNotFoundError:
                return
        with file:
            for line in file:
                number += 1
                fields, found = _parsed(line), Head(number=number, hash=_hash(line.removesuffix(b"\n")))
                if fields is None or fields["number"] != number:
                    raise self._broken(number)
                if fields["before"] != before:  # this line was altered, or the one before
                    following = _parsed(next(file, b""))
                    told = known.hash if known and known.number == number else following and following["before"]
                    raise self._broken(number - 1 if number > 1 and told in (None, found.hash) else number)
                before = found.hash
                yield found, fields

    def drop_incomplete_line(self) -> int:
        """Remove a last line that a power cut has left incomplete: it was never synced, so nobody relies on it.

        Returns:
            The number of bytes removed.

        Raises:
            RunError: the file cannot be written.
        """
        with translating_os_errors("write", self._path):
            try:
                descriptor = open_private(self._path, os.O_RDWR)
            except FileNotFoundError:
                return 0
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                num_bytes = len(_tail(descriptor).rpartition(b"\n")[2])
                if num_bytes:
                    os.ftruncate(descriptor, os.fstat(descriptor).st_size - num_bytes)
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return num_bytes

    def _head(self, tail: bytes) -> Head:
        if not tail:
            return Head(number=0, hash=START)
        last = tail.removesuffix(b"\n").rpartition(b"\n")[2]
        try:
            if not tail.endswith(b"\n"):
                raise ValueError
            return Head(number=int(json.loads(last)["number"]), hash=_hash(last))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._broken(None) from None

    def _broken(self, number: int | None) -> DamagedLogError:
        where = f"its last {self._noun}" if number is None else f"{self._noun} {number}"
        return DamagedLogError(
            f"'{self._path}': {where} does not continue the log: it was altered, moved, or cut off. {self._advice}"
        )


def _write_line(descriptor: int, line: bytes) -> None:
    """Write a whole line and sync it, or leave the file as it was."""
    size, rest = os.fstat(descriptor).st_size, line
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def _parsed(line: bytes) -> Mapping[str, Any] | None:
    """The fields of a whole line; None if it is not one of a log."""
    try:
        fields: Mapping[str, Any] = json.loads(line)
        return fields if line.endswith(b"\n") and {"number", "before"} <= fields.keys() else None
    except (ValueError, AttributeError, RecursionError):
        return None


def _tail(descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, _TAIL, max(0, size - _TAIL))


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()
