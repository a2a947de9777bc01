"""JSON Lines files that hold one record per key."""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedshelf.storage.atomic_files import make_folder, write_atomically


class RecordFile:
    """A JSON Lines file with one record per line, sorted by its `key`.

    Adding a record replaces the file atomically: after a crash it holds the record or does not, and no broken line.
    Processes that add records at the same time wait for each other.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> dict[str, dict[str, Any]]:
        """Return all records by key."""
        if not self.path.exists():
            return {}
        records = map(json.loads, self.path.read_text(encoding="utf-8").splitlines())
        return {record.pop("key"): record for record in records}

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Add a record, or replace the one with the same key.

        Raises:
            RunError: The file cannot be written.
        """
        # The folder carries the lock, since the file itself is replaced.
        folder = os.open(make_folder(self.path.parent), os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            records = self.load() | {key: dict(record)}
            lines = (json.dumps({"key": key, **records[key]}) + "\n" for key in sorted(records))
            write_atomically(self.path, "".join(lines))
        finally:
            os.close(folder)
