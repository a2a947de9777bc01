"""A member's record of the sums that it has helped to open, in a file."""

import os
from collections.abc import Sequence
from pathlib import Path

from fedshelf.core.errors import RefusedError, RunError
from fedshelf.privacy.secure_aggregation import wire
from fedshelf.privacy.secure_aggregation.unmasking import OpenedSum
from fedshelf.storage.atomic_files import open_private, translating_os_errors


class FileOpenedSums:
    """One line per sum. For one process and one thread.

    Args:
        path: the file.

    Raises:
        RunError: the file cannot be read, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        content = b""
        if path.exists():
            with translating_os_errors("read", path):
                content = path.read_bytes()
        *lines, rest = content.split(b"\n")
        try:
            self._known = [wire.from_text(line.decode(), OpenedSum) for line in lines]
        except (RefusedError, UnicodeDecodeError) as error:
            raise RunError(
                f"'{path}' is damaged, and this store no longer knows which sums it has opened: {error}. Restore the "
                "file from a copy, or delete it when no run with --secagg needs this store any more"
            ) from error
        if rest:  # of a power cut: nothing was revealed then
            with translating_os_errors("write", path):
                os.truncate(path, len(content) - len(rest))

    def known(self) -> Sequence[OpenedSum]:
        """See `OpenedSumStore`."""
        return self._known

    def record(self, opened: OpenedSum) -> None:
        """See `OpenedSumStore`.

        Raises:
            RunError: the disk is full, ...
        """
        with (
            translating_os_errors("write", self._path),
            os.fdopen(open_private(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "wb") as file,
        ):  # fmt: skip
            file.write(wire.to_text(opened).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._known.append(opened)
