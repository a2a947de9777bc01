"""The client's side of blob transfer: downloads models and uploads answers, outside the engine's messages.

Both directions resume after a break. A download is read into one preallocated buffer, an upload directly from the
tensors' memory; each is hashed once.
"""

import mmap
import sys
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPResponse

from fedshelf.core.errors import RefusedError, TransportError
from fedshelf.deploy.connection_errors import (
    PASSING_STATUSES,
    UNKNOWN_SESSION,
    ServerUnavailableError,
    SessionLostError,
)
from fedshelf.deploy.http_connection import HttpConnection
from fedshelf.serialization.blob import Blob, Hasher

CHUNK = 1 << 18  # bytes read, hashed or sent at once: fits in the L2 cache
ATTEMPTS = 3  # when a blob arrives damaged


class ReceivedBlob:
    """The newest blob sent to a client, complete or partial. It outlives a registration.

    Args:
        max_size: returns the maximum size in bytes.
    """

    def __init__(self, max_size: Callable[[], int] = lambda: sys.maxsize) -> None:
        self._max_size = max_size
        self._pages: mmap.mmap | None = None
        self.drop()

    def drop(self, digest: str = "") -> None:
        """Discard the content.

        Args:
            digest: digest of the next blob to receive.
        """
        self.digest = digest
        self.received = 0
        self.whole = False
        self.memory = memoryview(b"")
        self._hasher = Hasher()

    def expect(self, size: int) -> None:
        """Allocate memory for a blob of `size` bytes.

        The previous blob's memory is reused if nothing refers to it, because faulting in fresh pages takes longer than
        the transfer.

        Raises:
            RefusedError: the blob is larger than this client accepts.
        """
        if size > self._max_size():
            raise RefusedError(f"a model of {size:,} bytes is larger than the {self._max_size():,} that may come here")
        if self._pages is None or len(self._pages) != size or not _is_free(self._pages):
            self._pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if size else None
        self.memory = memoryview(self._pages or b"")

    def unfilled(self) -> memoryview:
        """Return the memory for the next bytes."""
        return self.memory[self.received : self.received + CHUNK]

    def advance(self, count: int) -> None:
        """Record that `count` bytes have arrived."""
        self._hasher.update(self.memory[self.received : self.received + count])
        self.received += count
        if self.received == len(self.memory):
            self.whole = self._hasher.digest == self.digest


class BlobClient:
    """Downloads and uploads blobs over a connection. Used only by the connection's thread.

    Args:
        connection: the connection to the server.
        identify: returns the headers that sign a request, for its method and path.
        held: the blob downloaded before.
    """

    def __init__(
        self, connection: HttpConnection, identify: Callable[[str, str], Mapping[str, str]], held: ReceivedBlob
    ) -> None:
        self._connection = connection
        self._identify = identify
        self._held = held
        self._damaged = 0
        self._smooth = False  # whether the last upload needed no retry
        self.num_moved = 0

    def fetch(self, digest: str) -> memoryview | None:
        """Download a blob.

        Args:
            digest: the blob's digest.

        Returns:
            The blob, or None if the server has withdrawn it. Do not modify it: the same memory is returned again.

        Raises:
            RefusedError: the blob arrived damaged repeatedly, or is too large.
            ServerUnavailableError: the connection broke; call again to resume.
        """
        held = self._held
        if held.digest != digest:
            held.drop(digest)
        while not held.whole:
            response = self._open(held)
            if response is None:
                return None
            while not held.whole and (count := self._connection.read_into(response, held.unfilled())):
                held.advance(count)
                self.num_moved += count
            if held.received < len(held.memory):
                self._connection.close()
                raise ServerUnavailableError("the connection ended amid a model")
            if not held.whole:
                self._note_damage(f"the model that the server sent came in damaged {ATTEMPTS} times")
                held.drop(digest)
        self._damaged = 0
        return held.memory

    def upload(self, blob: Blob) -> bool:
        """Upload a blob.

        Args:
            blob: the blob.

        Returns:
            False if the server does not want the blob or no longer does, else True.

        Raises:
            TransportError: the server will never accept the blob.
            ServerUnavailableError: the connection broke; call again to resume.
        """
        while True:
            # Usually the server has none of it. After a break, or in a client's first round, it may have a part.
            start = 0 if self._smooth else self._num_arrived(blob)
            self._smooth = False
            if start is None or start == blob.size:
                return start is not None
            headers = {
                **self._identify("PUT", _path(blob.digest)),
                "content-length": str(blob.size - start),
                "content-range": f"bytes {start}-{blob.size - 1}/{blob.size}",
            }
            answer = self._connection.send("PUT", _path(blob.digest), headers, self._counted(blob.chunks(start, CHUNK)))
            if answer.status == 201:
                self._damaged, self._smooth = 0, True
                return True
            if answer.status == 422:
                self._note_damage(f"the answer arrived damaged at the server {ATTEMPTS} times")
            elif answer.status != 409:  # more has arrived in the meantime: retry
                _check(answer.status)

    def _open(self, held: ReceivedBlob) -> HTTPResponse | None:
        """Request the missing part of the blob and allocate memory for it."""
        headers = dict(self._identify("GET", _path(held.digest)))
        if held.received:
            headers["range"] = f"bytes={held.received}-"
        response = self._connection.open("GET", _path(held.digest), headers)
        if response.status == 206:
            expected = f"bytes {held.received}-{len(held.memory) - 1}/{len(held.memory)}"
            if response.getheader("content-range") == expected:
                return response
        elif response.status == 200:
            held.drop(held.digest)
            try:
                held.expect(response.length or 0)
            except RefusedError:
                response.close()  # its body is not read
                self._connection.close()
                raise
            return response
        self._connection.close()
        if response.status == 404:
            held.drop()
            return None
        if response.status in (206, 416):
            held.drop(held.digest)
            raise ServerUnavailableError("the rest of the model is not to be had: it has to come anew")
        _check(response.status)
        return None

    def _num_arrived(self, blob: Blob) -> int | None:
        """Return how many of the blob's bytes the server has; None if it does not want the blob."""
        headers = {**self._identify("HEAD", _path(blob.digest)), "upload-length": str(blob.size)}
        answer = self._connection.request("HEAD", _path(blob.digest), headers)
        if answer.status == 403:
            return None
        if answer.status == 413:
            raise TransportError(
                f"the server takes no answer of {blob.size:,} bytes: it is larger than the model allows"
            )
        _check(answer.status, 204)
        start = answer.headers.get("upload-offset", "")
        if not start.isdecimal() or int(start) > blob.size:
            raise SessionLostError("the server does not say how much of the answer it has")
        return int(start)

    def _counted(self, chunks: Iterator[memoryview]) -> Iterator[memoryview]:
        for chunk in chunks:
            yield chunk
            self.num_moved += len(chunk)

    def _note_damage(self, problem: str) -> None:
        self._damaged += 1
        if self._damaged >= ATTEMPTS:
            self._damaged = 0
            raise RefusedError(f"{problem}: the line, or a memory, is faulty; start without --insecure")


def _is_free(pages: mmap.mmap) -> bool:
    """Whether no tensor refers to this memory."""
    try:
        pages.resize(len(pages))
    except (BufferError, SystemError):  # SystemError where the system cannot resize: then the answer is unknown
        return False
    return True


def _path(digest: str) -> str:
    return f"/fedshelf/blobs/{digest}"


def _check(status: int, expected: int = 0) -> None:
    if status == expected:
        return
    if status == 507:
        raise ServerUnavailableError("the server's disk takes no more")
    if status in PASSING_STATUSES:
        raise ServerUnavailableError(f"the server answers {status}")
    if status == 401:
        raise SessionLostError(UNKNOWN_SESSION)
    raise SessionLostError(f"the server answers {status}")
