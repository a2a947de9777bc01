"""Blobs kept on disk by digest: the frozen part of a model, which several runs on a machine share."""

import logging
import os
from pathlib import Path

from fedshelf.core.errors import FedShelfError
from fedshelf.serialization import blob as blobs
from fedshelf.serialization.blob import Blob
from fedshelf.storage.atomic_files import make_private_folder, map_file, write_atomically

MOST_KEPT = 4  # blobs; the one unused for longest is deleted for another

logger = logging.getLogger(__name__)


class BlobCache:
    """A folder of blobs. It can be deleted at any time: a missing or damaged blob is received again.

    Args:
        folder: created if it does not exist, readable by its owner only.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, digest: str) -> memoryview | None:
        """The blob named `digest`, mapped; None if it is not here."""
        path = self._folder / digest
        try:
            if not digest.isalnum() or not path.is_file():
                return None
            data = map_file(path)
            if blobs.digest(data) != digest:
                logger.warning("'%s' is damaged: it is received again", path)
                path.unlink()
                return None
            os.utime(path)  # used now
        except (OSError, FedShelfError):
            return None
        return data

    def save(self, blob: Blob) -> None:
        """Keep a blob. If that is impossible, it is received again next time."""
        path = self._folder / blob.digest
        if path.exists():
            return
        try:
            make_private_folder(self._folder)
            write_atomically(path, blob.pieces, durable=False)
            newest_first = sorted(self._folder.iterdir(), key=lambda kept: kept.stat().st_mtime, reverse=True)
            for superseded in newest_first[MOST_KEPT:]:
                superseded.unlink(missing_ok=True)
        except (OSError, FedShelfError) as error:
            logger.warning("the frozen part of the model is not kept for the next start: %s", error)
