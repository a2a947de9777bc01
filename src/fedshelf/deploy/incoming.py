"""Answers' bodies on their way in: one file per client, hashed while it comes, resumable at any byte.

    incoming/CLIENT/DIGEST

A file is named by its content's digest, in a folder named after the client (not the connection: a client comes back as
another one). A client may send only what it was asked for, one body at a time: another digest takes the place of the
one before. Files survive the server's death; what is there is hashed again when its client goes on with it.
"""

import logging
import shutil
import time
from pathlib import Path

from fedshelf.core.errors import RunError
from fedshelf.core.ports import Received
from fedshelf.deploy.upload_file import RefusedUploadError, Transfer, UploadFile
from fedshelf.storage.spool import file_name

LOG = logging.getLogger(__name__)

STALE_SECONDS = 24 * 3600.0  # what nobody has gone on with for so long is deleted
SWEEP_SECONDS = 3600.0


class Incoming:
    """All clients' uploads below one folder. Any thread may call; files are written by the caller's thread.

    `problem` is set once a file cannot be written: the run cannot go on.

    Args:
        directory: made when it is needed; on the file system of whoever takes the files over.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._clients: dict[int, str] = {}  # of those nodes that may upload
        self._files: dict[str, UploadFile] = {}
        self._swept = 0.0
        self.problem: RunError | None = None
        self._sweep()

    def expect(self, node_id: int, client: str, most: int) -> None:
        """The node `node_id`, which is `client`, may upload one body of at most `most` bytes."""
        for other in [node for node, name in list(self._clients.items()) if name == client and node != node_id]:
            self.forget(other)  # the client's connection from before
        folder = self._directory / Path(file_name(client)).stem
        self._files.setdefault(client, UploadFile(folder)).most = most
        self._clients[node_id] = client
        self._sweep()

    def forget(self, node_id: int) -> None:
        """The node may not upload any more; what it has sent stays for when its client comes back."""
        client = self._clients.pop(node_id, None)
        if client is not None:
            self._files[client].interrupt()

    def num_arrived(self, node_id: int, digest: str, size: int) -> int:
        """How many bytes of a body are here: `size` only where all are, and right.

        Raises:
            RefusedUploadError: nobody asked for it, or it is too large.
            RunError: the disk is full, ...
        """
        return self._file(node_id, size).num_arrived(digest, size)

    def open(self, node_id: int, digest: str, *, start: int, size: int) -> Transfer:
        """Go on at byte `start` with a body of `size` bytes. Whoever was at it before, is not any more.

        Raises:
            RefusedUploadError: nobody asked for it, it is too large, or `start` is not where it broke off.
            RunError: the disk is full, ...
        """
        return self._file(node_id, size).open(digest, start, size)

    def take(self, node_id: int, digest: str) -> Received | None:
        """The whole and verified body, now the caller's to move; None where it has not come. The node may then upload
        no more."""
        client = self._clients.pop(node_id, None)
        return None if client is None else self._files[client].take(digest)

    def clear(self) -> None:
        """Delete everything: the run has ended."""
        for node_id in list(self._clients):
            self.forget(node_id)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _file(self, node_id: int, size: int) -> UploadFile:
        client = self._clients.get(node_id)
        if client is None:
            raise RefusedUploadError(403, "no answer is expected from this node")
        file = self._files[client]
        if not 0 < size <= file.most:
            raise RefusedUploadError(413, f"an answer may have {file.most} bytes, not {size}")
        return file

    def _sweep(self) -> None:
        now = time.time()
        if now - self._swept < SWEEP_SECONDS:
            return
        self._swept = now
        for path in self._directory.glob("*/*"):
            try:
                if now - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()
                    LOG.info("deleted an upload that nobody has gone on with: %s", path.name)
            except OSError:  # somebody else has deleted it
                continue
