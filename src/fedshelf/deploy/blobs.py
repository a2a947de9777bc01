"""The server's blobs, outside the engine's messages: models for download, and uploads in progress.

    incoming/CLIENT/DIGEST

An upload is one file, hashed as it arrives and resumable at any byte. It is named by its content's digest, in a folder
named after the client rather than the connection, because a client gets a new connection when it returns. A client may
upload only what was requested, one blob at a time: a new digest replaces the previous one. Files survive a server
crash; their content is hashed again when the client resumes.
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fedshelf.core.encoded import Encoded
from fedshelf.core.errors import RunError
from fedshelf.core.messages import Broadcast
from fedshelf.core.ports import Received
from fedshelf.serialization.blob import Blob, Buffer, Hasher
from fedshelf.storage.atomic_files import make_own_folder, open_private, refuse_link, translating_os_errors
from fedshelf.storage.spool import file_name

logger = logging.getLogger(__name__)

# Maximum bytes of an answer's blob: several vectors as large as the model, plus slack.
UPLOAD_MODELS = 8
UPLOAD_SLACK = 64 << 20
UPLOAD_UNKNOWN = 1 << 30  # if no model has been sent yet: clients of a resumed run may already have it

STALE_SECONDS = 3600.0  # an upload not resumed for this long is deleted
SWEEP_SECONDS = 600.0
RESERVED_BYTES = 256 << 20  # of disk space, for the run itself: uploads do not use it
_BLOCK = 1 << 20


class Outgoing:
    """Blobs for download. Thread-safe: each method is a single dictionary operation."""

    def __init__(self) -> None:
        self._blobs: dict[int, Blob] = {}

    def publish(self, node_id: int, blob: Blob) -> None:
        """Let a node fetch `blob`, replacing its previous one."""
        self._blobs[node_id] = blob

    def withdraw(self, node_id: int) -> None:
        """Remove the blob of a node that has left."""
        self._blobs.pop(node_id, None)

    def find(self, node_id: int, digest: str) -> Blob | None:
        """Return the blob named `digest` if it is available to this node."""
        blob = self._blobs.get(node_id)
        return blob if blob is not None and blob.digest == digest else None


class RefusedUploadError(Exception):
    """An upload that is refused. Not raised outside this package.

    Args:
        status: the HTTP status.
        reason: the reason to send.
        arrived: the number of bytes that have arrived, if relevant.
    """

    def __init__(self, status: int, reason: str, *, arrived: int | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.arrived = arrived


class UploadFile:
    """The received part of a client's upload. Thread-safe.

    All methods except `interrupt` and `claim` raise RunError if a file cannot be written, for example on a full disk.

    Args:
        folder: the client's folder, created when needed. Nothing else may write to it.
    """

    def __init__(self, folder: Path) -> None:
        self.most = 0
        self._folder = folder
        self._lock = threading.Lock()
        self._turn = 0
        self._digest = ""
        self._size = self._arrived = 0
        self._whole = False
        self._hasher = Hasher()

    def num_arrived(self, digest: str, size: int) -> int:
        """See `Incoming.num_arrived`."""
        with self._lock:
            self._select(digest, size)
            return self._arrived

    def open(self, digest: str, start: int, size: int) -> "Transfer":
        """See `Incoming.open`."""
        with self._lock:
            self._select(digest, size)
            if shutil.disk_usage(self._folder).free < size - start + RESERVED_BYTES:
                raise RefusedUploadError(507, "the server has no room for it at the moment")
            if start != self._arrived:
                raise RefusedUploadError(409, f"{self._arrived} bytes are here", arrived=self._arrived)
            self._turn += 1
            return Transfer(self, self._turn)

    def append(self, turn: int, chunks: Sequence[Buffer]) -> None:
        """See `Transfer.append`."""
        with self._lock:
            self._check(turn)
            if self._arrived + sum(map(len, chunks)) > self._size:
                raise RefusedUploadError(400, "there is more than was announced")
            path = self._path()
            with translating_os_errors("write", path):
                descriptor = open_private(path, os.O_WRONLY | os.O_CREAT)
                try:
                    for chunk in chunks:
                        _write_all(descriptor, chunk, self._arrived)
                        self._hasher.update(chunk)
                        self._arrived += len(chunk)
                finally:
                    os.close(descriptor)

    def finish(self, turn: int) -> None:
        """See `Transfer.finish`."""
        with self._lock:
            self._check(turn)
            if self._arrived < self._size:
                raise RefusedUploadError(400, "there is less than was announced", arrived=self._arrived)
            if self._hasher.digest != self._digest:
                self._start_over()
                raise RefusedUploadError(422, "the bytes are not those that their digest names", arrived=0)
            self._whole = True

    def claim(self, digest: str) -> Received | None:
        """See `Incoming.claim`."""
        with self._lock:
            if not (self._whole and self._digest == digest):
                return None
            received = Received(path=self._path(), digest=digest)
            self._forget()
            return received

    def interrupt(self) -> None:
        """End the current transfer."""
        with self._lock:
            self._turn += 1

    def _check(self, turn: int) -> None:
        if turn != self._turn:
            raise RefusedUploadError(409, "another connection continues this upload", arrived=self._arrived)

    def _select(self, digest: str, size: int) -> None:
        """Switch to this blob: reload what an earlier process left of it and drop any other."""
        if digest != self._digest:
            make_own_folder(self._folder.parent)
            make_own_folder(self._folder)
            for path in self._folder.iterdir():
                if path.name != digest:
                    with translating_os_errors("delete", path):
                        path.unlink(missing_ok=True)
            self._turn += 1
            self._forget()
            self._digest = digest
            self._read_again()
        if self._arrived > size or (self._arrived == size and not self._whole and self._hasher.digest != digest):
            self._start_over()
        self._size = size
        self._whole = self._arrived == size

    def _read_again(self) -> None:
        path = self._path()
        if not path.is_file():
            return
        with translating_os_errors("read", path), path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                self._hasher.update(block)
                self._arrived += len(block)

    def _start_over(self) -> None:
        with translating_os_errors("delete", self._path()):
            self._path().unlink(missing_ok=True)
        self._arrived, self._whole, self._hasher = 0, False, Hasher()

    def _forget(self) -> None:
        self._digest, self._size, self._arrived, self._whole, self._hasher = "", 0, 0, False, Hasher()

    def _path(self) -> Path:
        return self._folder / self._digest


class Transfer:
    """One connection's transfer of an upload."""

    def __init__(self, file: UploadFile, turn: int) -> None:
        self._file = file
        self._turn = turn

    def append(self, chunks: Sequence[Buffer]) -> None:
        """Append received bytes.

        Args:
            chunks: the bytes.

        Raises:
            RefusedUploadError: there are more bytes than announced, or another connection has taken over.
            RunError: a file cannot be written, for example on a full disk.
        """
        self._file.append(self._turn, chunks)

    def finish(self) -> None:
        """Complete the upload and verify its digest.

        Raises:
            RefusedUploadError: bytes are missing, the digest does not match (the content is then discarded), or another
                connection has taken over.
        """
        self._file.finish(self._turn)


def _write_all(descriptor: int, chunk: Buffer, offset: int) -> None:
    rest = memoryview(chunk)
    while rest:
        count = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[count:], offset + count


class Incoming:
    """All clients' uploads, below one folder. Thread-safe; files are written by the calling thread.

    Args:
        directory: created when needed; on the same file system as the final location of the files.

    Attributes:
        problem: set once a file cannot be written; the run cannot continue.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._clients: dict[int, str] = {}  # by node that may upload
        self._files: dict[str, UploadFile] = {}
        self._swept = 0.0
        self.problem: RunError | None = None
        self._remove_stale()

    def expect(self, node_id: int, client: str, most: int) -> None:
        """Allow a node to upload one blob.

        Args:
            node_id: the node.
            client: the client's name.
            most: maximum size in bytes.
        """
        for other in [node for node, name in list(self._clients.items()) if name == client and node != node_id]:
            self.forget(other)  # the client's previous connection
        folder = self._directory / Path(file_name(client)).stem
        self._files.setdefault(client, UploadFile(folder)).most = most
        self._clients[node_id] = client
        self._remove_stale()

    def forget(self, node_id: int) -> None:
        """Stop accepting uploads from a node. What has arrived is kept for when its client returns."""
        client = self._clients.pop(node_id, None)
        if client is not None:
            self._files[client].interrupt()

    def num_arrived(self, node_id: int, digest: str, size: int) -> int:
        """Return how many bytes of an upload have arrived: `size` only if it is complete and verified.

        Args:
            node_id: the uploading node.
            digest: the blob's digest.
            size: the blob's size in bytes.

        Raises:
            RefusedUploadError: the upload was not requested or is too large.
            RunError: a file cannot be written, for example on a full disk.
        """
        return self._file(node_id, size).num_arrived(digest, size)

    def open(self, node_id: int, digest: str, *, start: int, size: int) -> Transfer:
        """Start or resume an upload. A transfer of the same client that is in progress ends.

        Args:
            node_id: the uploading node.
            digest: the blob's digest.
            start: offset of the first byte to come.
            size: the blob's size in bytes.

        Returns:
            The transfer.

        Raises:
            RefusedUploadError: the upload was not requested, is too large, or does not resume at `start`.
            RunError: a file cannot be written, for example on a full disk.
        """
        return self._file(node_id, size).open(digest, start, size)

    def claim(self, node_id: int, digest: str) -> Received | None:
        """Hand over a complete, verified upload. The node may then not upload anything else.

        Args:
            node_id: the uploading node.
            digest: the blob's digest.

        Returns:
            The blob, which the caller may move, or None if it is incomplete.
        """
        client = self._clients.pop(node_id, None)
        return None if client is None else self._files[client].claim(digest)

    def clear(self) -> None:
        """Delete all uploads at the end of the run."""
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

    def _remove_stale(self) -> None:
        now = time.time()
        if now - self._swept < SWEEP_SECONDS:
            return
        self._swept = now
        refuse_link(self._directory)
        for path in (p for folder in self._directory.glob("*") if not folder.is_symlink() for p in folder.glob("*")):
            try:
                if now - path.lstat().st_mtime > STALE_SECONDS:
                    path.unlink()
                    logger.info("deleted an upload that was not resumed: %s", path.name)
            except OSError:  # already deleted by another process
                continue


@dataclass(frozen=True, kw_only=True, slots=True)
class Blobs:
    """Blobs in both directions, shared by the transport (which sets permissions) and the routes (which move bytes).

    Attributes:
        outgoing: blobs for download.
        incoming: uploads.
    """

    outgoing: Outgoing
    incoming: Incoming

    @classmethod
    def below(cls, directory: Path) -> Self:
        """Create an instance whose uploads are stored in `directory`."""
        return cls(outgoing=Outgoing(), incoming=Incoming(directory))

    def forget(self, node_id: int) -> None:
        """Drop the permissions of a node that has left."""
        self.outgoing.withdraw(node_id)
        self.incoming.forget(node_id)


def model_bytes(message: Broadcast) -> int:
    """Return the model's size in bytes as float32 values; 0 if the message does not determine it."""
    if message.is_plain:
        return message.params.numel() * message.params.element_size()
    sizes = [4 * vector.size for vector in message.vectors.values() if isinstance(vector, Encoded)]
    return sum(sizes) // max(1, len(message.deltas))


def max_upload_bytes(largest_model: int) -> int:
    """Return the maximum size of an answer in bytes.

    Args:
        largest_model: size in bytes of the largest model sent; 0 if none was.
    """
    return UPLOAD_MODELS * largest_model + UPLOAD_SLACK if largest_model else UPLOAD_UNKNOWN
