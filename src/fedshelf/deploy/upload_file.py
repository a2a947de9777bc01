"""One client's upload as a file that grows."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path

from fedshelf.core.ports import Received
from fedshelf.serialization.blob import Buffer, Hasher
from fedshelf.storage.atomic_files import make_folder, saying_what_to_do

_BLOCK = 1 << 20


class RefusedUploadError(Exception):
    """An upload that is not taken: the HTTP status and the reason to tell, and how many bytes there are where that
    matters. Never leaves this room."""

    def __init__(self, status: int, reason: str, *, arrived: int | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.arrived = arrived


class UploadFile:
    """What has arrived of a client's one upload. Any thread may call.

    All but `interrupt` and `take` raise RunError where the disk is full or the like.

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

    def take(self, digest: str) -> Received | None:
        """See `Incoming.take`."""
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
