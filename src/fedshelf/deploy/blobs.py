"""Blobs beside the engine's messages, at the server: models that clients may fetch, and uploads on their way in.

    incoming/CLIENT/DIGEST

An upload is one file, hashed while it comes and resumable at any byte. It is named by its content's digest, in a folder
named after the client (not the connection: a client comes back as another one). A client may send only what it was
asked for, one blob at a time: another digest replaces the one before. Files survive the server's death; what is there
is hashed again when its client resumes.
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
from fedshelf.storage.atomic_files import make_folder, saying_what_to_do
from fedshelf.storage.spool import file_name

logger = logging.getLogger(__name__)

# Bytes that an answer's blob may have: several vectors as large as the model, and some more.
UPLOAD_MODELS = 4
UPLOAD_SLACK = 64 << 20
UPLOAD_UNKNOWN = 1 << 30  # where no model has been sent yet: clients of a resumed run may hold it already

STALE_SECONDS = 24 * 3600.0  # an upload that nobody has resumed for so long is deleted
SWEEP_SECONDS = 3600.0
_BLOCK = 1 << 20


class Outgoing:
    """Any thread may call: each operation is a single one on a dictionary."""

    def __init__(self) -> None:
        self._blobs: dict[int, Blob] = {}

    def publish(self, node_id: int, blob: Blob) -> None:
        """From now on the node may fetch `blob`, in place of the one before: a newer task replaces an older."""
        self._blobs[node_id] = blob

    def withdraw(self, node_id: int) -> None:
        """The node has gone."""
        self._blobs.pop(node_id, None)

    def find(self, node_id: int, digest: str) -> Blob | None:
        """The body named `digest`, if it is this node's to have."""
        blob = self._blobs.get(node_id)
        return blob if blob is not None and blob.digest == digest else None


class RefusedUploadError(Exception):
    """An upload that is not taken: the HTTP status and the reason to tell, and how many bytes there are where that
    matters. Never leaves this room."""

    def __init__(self, status: int, reason: str, *, arrived: int | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.arrived = arrived


class UploadFile:
    """What has arrived of a client's one upload. Any thread may call.

    All but `interrupt` and `claim` raise RunError where the disk is full or the like.

    Args:
        folder: the client's; made when it is needed. Nothing else may write there.
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
            with saying_what_to_do("write", path):
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
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
        """End the turn of whoever is at it."""
        with self._lock:
            self._turn += 1

    def _check(self, turn: int) -> None:
        if turn != self._turn:
            raise RefusedUploadError(409, "another connection goes on with this upload", arrived=self._arrived)

    def _select(self, digest: str, size: int) -> None:
        """Turn to this body: to what an earlier process left of it, and away from any other."""
        if digest != self._digest:
            make_folder(self._folder)
            for path in self._folder.iterdir():
                if path.name != digest:
                    with saying_what_to_do("delete", path):
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
        with saying_what_to_do("read", path), path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                self._hasher.update(block)
                self._arrived += len(block)

    def _start_over(self) -> None:
        with saying_what_to_do("delete", self._path()):
            self._path().unlink(missing_ok=True)
        self._arrived, self._whole, self._hasher = 0, False, Hasher()

    def _forget(self) -> None:
        self._digest, self._size, self._arrived, self._whole, self._hasher = "", 0, 0, False, Hasher()

    def _path(self) -> Path:
        return self._folder / self._digest


class Transfer:
    """One connection's turn at a body."""

    def __init__(self, file: UploadFile, turn: int) -> None:
        self._file = file
        self._turn = turn

    def append(self, chunks: Sequence[Buffer]) -> None:
        """Add what came in.

        Raises:
            RefusedUploadError: it is more than was announced, or another connection's turn.
            RunError: the disk is full, ...
        """
        self._file.append(self._turn, chunks)

    def finish(self) -> None:
        """That was all.

        Raises:
            RefusedUploadError: it is not what its digest names (nothing of it is kept), or another connection's turn.
        """
        self._file.finish(self._turn)


def _write_all(descriptor: int, chunk: Buffer, offset: int) -> None:
    rest = memoryview(chunk)
    while rest:
        count = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[count:], offset + count


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

    def claim(self, node_id: int, digest: str) -> Received | None:
        """The whole and verified body, now the caller's to move; None where it has not come. The node may then upload
        no more."""
        client = self._clients.pop(node_id, None)
        return None if client is None else self._files[client].claim(digest)

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
                    logger.info("deleted an upload that nobody has gone on with: %s", path.name)
            except OSError:  # somebody else has deleted it
                continue


@dataclass(frozen=True, kw_only=True, slots=True)
class Blobs:
    """Shared by the transport, which says who may fetch and bring what, and the routes, which move the bytes."""

    outgoing: Outgoing
    incoming: Incoming

    @classmethod
    def below(cls, directory: Path) -> Self:
        """Uploads come into `directory`."""
        return cls(outgoing=Outgoing(), incoming=Incoming(directory))

    def forget(self, node_id: int) -> None:
        """The node has gone."""
        self.outgoing.withdraw(node_id)
        self.incoming.forget(node_id)


def model_bytes(message: Broadcast) -> int:
    """Bytes of the model as float32 values; 0 where the message does not say."""
    if message.is_plain:
        return message.params.numel() * message.params.element_size()
    sizes = [4 * vector.size for vector in message.vectors.values() if isinstance(vector, Encoded)]
    return sum(sizes) // max(1, len(message.deltas))


def most_of_upload(largest_model: int) -> int:
    """The most bytes that an answer may have; `largest_model` in bytes, 0 if none was sent."""
    return UPLOAD_MODELS * largest_model + UPLOAD_SLACK if largest_model else UPLOAD_UNKNOWN
