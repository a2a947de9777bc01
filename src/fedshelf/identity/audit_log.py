"""The server's audit log: who was enrolled, revoked, admitted or refused, and what each upload was.

Never in it: tokens, vectors, and text from a peer that has not been made printable and short. The log is a hash chain,
apart from the run's database, in files of at most `MAX_BYTES` each; the first line of a file names the last hash of the
file before. The oldest files can be pruned: a line of the rest then names the number and the last hash of the newest
pruned file, so that the rest can be verified.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from datetime import date
from itertools import takewhile
from pathlib import Path
from typing import Any

from fedshelf.core.errors import RunError
from fedshelf.core.system_errors import current_user
from fedshelf.core.text import printable
from fedshelf.storage.atomic_files import saying_what_to_do
from fedshelf.storage.hash_chain import START, DamagedLogError, HashChain, Head

logger = logging.getLogger(__name__)

PRUNED = "log files deleted"
"""Names the newest file that was deleted, and its last hash."""
MAX_BYTES = 16 << 20
MAX_CHARACTERS = 500  # of one field
SUMMARY_SECONDS = 60.0
MAX_COUNTED = 1000  # kinds and addresses told apart in that time


class AuditLog:
    """Writes `audit-NNNN.jsonl` in a folder. Thread-safe; several processes may write.

    Args:
        folder: an existing folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._counted_at = time.monotonic()

    def write(self, event: str, **fields: str | int | float | None) -> None:
        """Append an event. A log that cannot be written is reported, and does not stop the server.

        Args:
            event: what happened, for example ``"enrolled"``.
            fields: details; text is made printable and cut to `MAX_CHARACTERS`.
        """
        clean = {name: _clean(value) for name, value in fields.items() if value is not None}
        try:
            with self._lock:
                self._append({"event": event, **clean})
        except RunError as error:
            logger.error("the audit log is not written: %s", error)

    def write_action(self, event: str, **fields: str | int | float | None) -> None:
        """Append what an operator has done, with the system's user that did it; see `write`."""
        self.write(event, **fields, operator=current_user())

    def count(self, event: str, address: str, store: str = "") -> None:
        """Count an event that a peer can cause at will, such as a failed handshake; see `flush`.

        Args:
            event: what happened.
            address: the peer's address.
            store: the store's name; "" for a stranger.
        """
        with self._lock:
            if len(self._counts) >= MAX_COUNTED and (event, address, store) not in self._counts:
                address, store = "other addresses", ""
                event = event if len(self._counts) < 2 * MAX_COUNTED else "other events"  # they may contain names
            self._counts[event, address, store] += 1
            due = time.monotonic() - self._counted_at > SUMMARY_SECONDS
        if due:
            self.flush()

    def flush(self, *, if_due: bool = False) -> None:
        """Write one line for each kind, address and store counted since the last time.

        Args:
            if_due: only if that was `SUMMARY_SECONDS` ago.
        """
        with self._lock:
            if if_due and time.monotonic() - self._counted_at < SUMMARY_SECONDS:
                return
            counts, self._counts, self._counted_at = self._counts, Counter(), time.monotonic()
        for (event, address, store), count in sorted(counts.items()):
            self.write(event, address=address, store=store or None, count=count)

    def events(self) -> Iterator[Mapping[str, Any]]:
        """Read all events, oldest first, and check the chain.

        Raises:
            RunError: a file cannot be read, a line is not the successor of the one before, or a file is missing that
                was not pruned.
        """
        files = self._files()
        first = _number(files[0]) if files else 1
        heads: dict[str, object] = {}  # by file's number
        is_complete = first == 1
        for number, path in enumerate(files, first):
            if path.name != _name(number):
                raise self._missing(number)
            chain = HashChain(path)
            for index, event in enumerate(chain.lines()):
                if index == 0 and number > 1:
                    before = event.get("continues")
                    if heads.setdefault(str(number - 1), before) != before:
                        raise RunError(f"'{path}' does not continue the file before it: one of the two was altered")
                if event.get("event") == PRUNED:
                    is_complete |= heads.get(str(event.get("through")), START) == event.get("head", "")
                yield event
            heads[str(number)] = chain.head().hash
        if not is_complete:
            raise self._missing(first - 1)

    def head(self) -> Head:
        """The newest line of the newest file.

        Raises:
            RunError: the file cannot be read, or its last line is not whole.
        """
        files = self._files()
        return HashChain(files[-1]).head() if files else Head(number=0, hash=START)

    def prune(self, before: date) -> int:
        """Delete the oldest files. The newest file is kept, and the rest can still be verified.

        Args:
            before: files of which every line is older are deleted.

        Returns:
            The number of deleted files.

        Raises:
            RunError: the log is damaged, and nothing is deleted; or a file cannot be deleted.
        """
        deque(self.events(), maxlen=0)
        old = list(takewhile(lambda path: _newest_time(path) < before.isoformat(), self._files()[:-1]))
        if old:
            self.write_action(PRUNED, through=_number(old[-1]), head=HashChain(old[-1]).head().hash)
        for path in old:
            with saying_what_to_do("delete", path):
                path.unlink()
        return len(old)

    def _missing(self, number: int) -> RunError:
        return RunError(f"'{self._folder / _name(number)}' is missing: the audit log is not complete")

    def _append(self, fields: Mapping[str, Any]) -> None:
        files = self._files() or [self._folder / _name(1)]
        newest = files[-1]
        if newest.exists() and newest.stat().st_size > MAX_BYTES:
            before, newest = HashChain(newest).head(), self._folder / _name(_number(newest) + 1)
            HashChain(newest).append({"event": "continued", "continues": before.hash})
        try:
            HashChain(newest).append(fields)
        except DamagedLogError as error:  # what happens from now on is recorded all the same
            logger.error("%s", error)
            newest = self._folder / _name(_number(newest) + 1)
            HashChain(newest).append({"event": "the log before this file is damaged", "continues": ""})
            HashChain(newest).append(fields)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("audit-*.jsonl"))


def _name(number: int) -> str:
    return f"audit-{number:04d}.jsonl"


def _number(path: Path) -> int:
    digits = path.stem.removeprefix("audit-")
    return int(digits) if digits.isdigit() else 0


def _newest_time(path: Path) -> str:
    (line,) = deque(HashChain(path).lines(), maxlen=1)
    return str(line["time"])


def _clean(value: str | int | float) -> str | int | float:
    return printable(value)[:MAX_CHARACTERS] if isinstance(value, str) else value
