"""The server's audit log: who was enrolled, revoked, admitted or refused, and what each upload was.

Never in it: tokens, vectors, and text from a peer that has not been made printable and short. The log is a hash chain,
apart from the run's database, in files of at most `MAX_BYTES` each; the first line of a file names the last hash of the
file before.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedshelf.core.errors import RunError
from fedshelf.core.text import printable
from fedshelf.storage.hash_chain import START, DamagedLogError, HashChain

logger = logging.getLogger(__name__)

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
        self._counts: Counter[tuple[str, str]] = Counter()
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

    def count(self, event: str, address: str) -> None:
        """Count an event that a stranger can cause at will, such as a failed handshake; see `flush`."""
        with self._lock:
            if len(self._counts) >= MAX_COUNTED and (event, address) not in self._counts:
                address = "other addresses"
            self._counts[event, address] += 1
            due = time.monotonic() - self._counted_at > SUMMARY_SECONDS
        if due:
            self.flush()

    def flush(self) -> None:
        """Write one line for each kind and address counted since the last time."""
        with self._lock:
            counts, self._counts, self._counted_at = self._counts, Counter(), time.monotonic()
        for (event, address), count in sorted(counts.items()):
            self.write(event, address=address, count=count)

    def events(self) -> Iterator[Mapping[str, Any]]:
        """Read all events, oldest first, and check the chain.

        Raises:
            RunError: a file cannot be read, a line is not the successor of the one before, or a file is missing.
        """
        last = START
        for number, path in enumerate(self._files(), 1):
            if path.name != _name(number):
                raise RunError(f"'{self._folder / _name(number)}' is missing: the audit log is not complete")
            chain = HashChain(path)
            for index, event in enumerate(chain.lines()):
                if index == 0 and number > 1 and event.get("continues") != last:
                    raise RunError(f"'{path}' does not continue the file before it: one of the two was altered")
                yield event
            last = chain.head().hash

    def _append(self, fields: Mapping[str, Any]) -> None:
        files = self._files() or [self._folder / _name(1)]
        newest = files[-1]
        if newest.exists() and newest.stat().st_size > MAX_BYTES:
            before, newest = HashChain(newest).head(), self._folder / _name(len(files) + 1)
            HashChain(newest).append({"event": "continued", "continues": before.hash})
        try:
            HashChain(newest).append(fields)
        except DamagedLogError as error:  # what happens from now on is recorded all the same
            logger.error("%s", error)
            newest = self._folder / _name(len(files) + 1)
            HashChain(newest).append({"event": "the log before this file is damaged", "continues": ""})
            HashChain(newest).append(fields)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("audit-*.jsonl"))


def _name(number: int) -> str:
    return f"audit-{number:04d}.jsonl"


def _clean(value: str | int | float) -> str | int | float:
    return printable(value)[:MAX_CHARACTERS] if isinstance(value, str) else value
