"""A store's durable record of which store decrypts a run, if the run's configuration names none.

One store's record of decrypted sums covers all of them only as long as the same store decrypts. So a store that was
told once who decrypts accepts no other for that run, also after a restart.
"""

import json
from pathlib import Path
from typing import Protocol

from fedshelf.core.errors import RunError
from fedshelf.storage.atomic_files import translating_os_errors, write_atomically


class DecryptorRecord(Protocol):
    """Which store decrypts, by run."""

    def known(self, run_id: str) -> str | None:
        """The store that decrypts; None if none was recorded."""

    def record(self, run_id: str, store: str) -> None:
        """Record one. It is durable when this returns."""


class FileDecryptors:
    """A JSON file.

    Args:
        path: the file.

    Raises:
        RunError: the file cannot be read, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, str] = {}
        if path.exists():
            with translating_os_errors("read", path):
                content = path.read_text(encoding="utf-8")
            try:
                self._known = {str(run_id): str(store) for run_id, store in json.loads(content).items()}
            except (ValueError, AttributeError) as error:
                raise RunError(
                    f"'{path}' is damaged, and this store no longer knows which store decrypts its runs. Restore the "
                    "file from a copy, or delete it when no run with --he needs this store any more"
                ) from error

    def known(self, run_id: str) -> str | None:
        """See `DecryptorRecord`."""
        return self._known.get(run_id)

    def record(self, run_id: str, store: str) -> None:
        """See `DecryptorRecord`.

        Raises:
            RunError: the disk is full, ...
        """
        self._known = {**self._known, run_id: store}
        write_atomically(self._path, json.dumps(self._known))
