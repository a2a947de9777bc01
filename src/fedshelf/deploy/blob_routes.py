"""`/fedshelf/blobs/DIGEST`: downloads of models and uploads of answers as plain, resumable HTTP bodies.

    GET   (Range: bytes=N-)                        200, 206   the blob that was sent to this node
    HEAD  (Upload-Length: SIZE)                    204        Upload-Offset: how many bytes of an upload have arrived
    PUT   (Content-Range: bytes N-LAST/SIZE)       201        the rest of the upload

Error statuses:

    401  the node is not registered
    403  the upload was not requested
    404  the blob is not, or is no longer, available to this node
    408  the client was silent for too long
    409  the offset differs from the one in `Upload-Offset`
    413  too many bytes
    416  the range does not exist
    422  the content does not match the digest
    507  the disk is full

Files are written and hashed in threads, half a megabyte at a time. At most one further batch is read during a write, so
a fast sender is slowed down to the disk's speed.
"""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Executor
from typing import Any, TypeAlias, TypeVar

from fedshelf.core.errors import RunError
from fedshelf.deploy.blobs import Blobs, RefusedUploadError

logger = logging.getLogger(__name__)

Scope: TypeAlias = Any  # the ASGI specification's types are mappings and callables without a fixed shape
Receive: TypeAlias = Any
Send: TypeAlias = Any
Headers: TypeAlias = Mapping[bytes, bytes]
_T = TypeVar("_T")

PATH = re.compile(r"/fedshelf/blobs/([0-9a-f]{64})")
RANGE = re.compile(rb"bytes=(\d{1,15})-(\d{1,15})?")
CONTENT_RANGE = re.compile(rb"bytes (\d{1,15})-(\d{1,15})/(\d{1,15})")
CHUNK = 1 << 18  # bytes sent at once
BATCH = 1 << 19  # bytes written at once
TOO_LARGE = frozenset({413, 507})  # statuses of uploads that are over a limit
SILENCE_SECONDS = 30.0  # maximum wait for a chunk; the client can resume later
BATCH_SECONDS = 120.0  # maximum wait for a batch


class BlobRoutes:
    """Handles the blob requests of registered nodes.

    Args:
        blobs: the blobs that nodes may fetch, and the destination of uploads.
        workers: threads that write files.
    """

    def __init__(self, blobs: Blobs, workers: Executor) -> None:
        self._outgoing = blobs.outgoing
        self._incoming = blobs.incoming
        self._workers = workers

    async def serve(
        self, node_id: int, digest: str, scope: Scope, receive: Receive, send: Send, over: Callable[[str], object]
    ) -> None:  # fmt: skip
        """Handle a request of `node_id`; `over` is told of an upload that is larger than it may be."""
        headers: Headers = dict(scope["headers"])
        try:
            match scope["method"]:
                case "GET":
                    await self._get(node_id, digest, headers, send)
                case "HEAD":
                    size = _number(headers.get(b"upload-length", b""))
                    arrived = await self._in_thread(lambda: self._incoming.num_arrived(node_id, digest, size))
                    await answer(send, 204, headers={"upload-offset": arrived})
                case "PUT":
                    await self._put(node_id, digest, headers, receive)
                    await answer(send, 201)
                case _:
                    await answer(send, 405)
        except RefusedUploadError as refusal:
            if refusal.status in TOO_LARGE:
                over(str(refusal))
            told = {} if refusal.arrived is None else {"upload-offset": refusal.arrived}
            await answer(send, refusal.status, headers=told, reason=str(refusal))
        except RunError as error:
            logger.error("an upload cannot be kept: %s", error)
            self._incoming.problem = error
            await answer(send, 507, reason="the server cannot keep it")

    async def _get(self, node_id: int, digest: str, headers: Headers, send: Send) -> None:
        body = self._outgoing.find(node_id, digest)
        if body is None:
            await answer(send, 404, reason="there is no such body for this node")
            return
        start, stop = 0, body.size
        asked = RANGE.fullmatch(headers.get(b"range", b""))
        if asked:
            start, stop = int(asked[1]), min(stop, int(asked[2]) + 1 if asked[2] else stop)
            if start >= stop:
                await answer(send, 416, headers={"content-range": f"bytes */{body.size}"})
                return
        told: dict[str, object] = {"content-type": "application/octet-stream", "content-length": stop - start}
        told |= {"content-range": f"bytes {start}-{stop - 1}/{body.size}"} if asked else {}
        await send(_start(206 if asked else 200, told))
        try:
            async with asyncio.timeout(None) as patience:
                for chunk in body.chunks(start, CHUNK, stop):
                    patience.reschedule(asyncio.get_running_loop().time() + SILENCE_SECONDS)
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except TimeoutError:
            return  # an incomplete response makes the server close the connection
        await send({"type": "http.response.body", "body": b""})

    async def _put(self, node_id: int, digest: str, headers: Headers, receive: Receive) -> None:
        span = CONTENT_RANGE.fullmatch(headers.get(b"content-range", b""))
        if span is None:
            raise RefusedUploadError(400, "Content-Range says which bytes these are: bytes FIRST-LAST/SIZE")
        start, last, size = map(int, span.groups())
        if last != size - 1 or _number(headers.get(b"content-length", b"")) != size - start:
            raise RefusedUploadError(400, "an upload goes on to its end, and Content-Length says how far that is")
        transfer = await self._in_thread(lambda: self._incoming.open(node_id, digest, start=start, size=size))
        writing: asyncio.Future[None] | None = None
        try:
            async for chunks in _batches(receive):
                if writing is not None:
                    await writing
                writing = self._in_thread(lambda chunks=chunks: transfer.append(chunks))  # type: ignore[misc]
        finally:
            if writing is not None:
                await writing
        await self._in_thread(transfer.finish)

    def _in_thread(self, work: Callable[[], _T]) -> "asyncio.Future[_T]":
        return asyncio.get_running_loop().run_in_executor(self._workers, work)


async def _batches(receive: Receive) -> AsyncIterator[list[bytes]]:
    """Yield the request's body in batches, including the rest before a break.

    Raises:
        RefusedUploadError: the body broke off or arrived too slowly.
    """
    chunks: list[bytes] = []
    more, problem = True, ""
    while more and not problem:
        num_bytes = 0
        try:
            async with asyncio.timeout(BATCH_SECONDS):
                while more and num_bytes < BATCH:
                    async with asyncio.timeout(SILENCE_SECONDS):
                        message = await receive()
                    if message["type"] == "http.disconnect":
                        problem = "the connection broke"
                        break
                    chunks.append(message.get("body", b""))
                    num_bytes += len(chunks[-1])
                    more = message.get("more_body", False)
        except TimeoutError:
            problem = "too slow: go on on a new connection"
        if chunks:
            yield chunks
            chunks = []
    if problem:
        raise RefusedUploadError(408, problem)


def _number(text: bytes) -> int:
    """Parse a size from a header; return -1 if it is invalid."""
    return int(text) if text.isdigit() and len(text) <= 15 else -1


def _start(status: int, headers: Mapping[str, object]) -> dict[str, Any]:
    encoded = [(name.encode(), str(value).encode()) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": encoded}


async def answer(
    send: Send, status: int, body: bytes = b"", headers: Mapping[str, object] | None = None, *, reason: str = ""
) -> None:
    """Send a short response. After a refusal the connection closes and the rest of the request is not read.

    Args:
        send: the ASGI channel.
        status: the HTTP status.
        body: the content; JSON unless `headers` say otherwise.
        headers: further headers.
        reason: why the request is refused, instead of `body`.
    """
    content = json.dumps({"detail": reason}).encode() if reason else body
    told: dict[str, object] = {"content-type": "application/json", **(headers or {})}
    if status != 204:
        told["content-length"] = len(content)
    if status >= 400:
        told["connection"] = "close"
    await send(_start(status, told))
    await send({"type": "http.response.body", "body": content})
