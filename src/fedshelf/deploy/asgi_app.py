"""The server's ASGI app: Flower's fleet routes and FedShelf's own routes. Any other request is refused.

Requests are authenticated before their body is read (`admission`), off the event loop.

`POST /fedshelf/pull` and `/fedshelf/push` transfer a whole message in one request, where the fleet routes need one
request per object. A pull stays open briefly until a message is available, so clients do not poll in a tight loop.

`POST /fedshelf/wait` stays open until the run ends. It serves as the client's heartbeat, notifies the client while it
trains, and reveals that its process died when the connection breaks. `POST /fedshelf/died` reports the cause: the
client's crash reporter sends it, authenticated by the token that came with the client's waits.
"""

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from fedshelf.core.errors import FedShelfError
from fedshelf.core.text import printable
from fedshelf.deploy.admission import MAX_ENROLLMENT_BYTES, Admission, Caller, UnauthenticatedError, clock
from fedshelf.deploy.blob_routes import PATH as BLOB_PATH
from fedshelf.deploy.blob_routes import BlobRoutes, Receive, Scope, Send, answer
from fedshelf.deploy.blobs import Blobs
from fedshelf.deploy.crash_reporter import SIGNALS, TOKEN_HEADER
from fedshelf.deploy.greeting import CLOCK_HEADER, clock_problem

if TYPE_CHECKING:
    from fedshelf.deploy.flower_engine import FlowerEngine

logger = logging.getLogger(__name__)

PREFIX = "/v1/fleet/"
PROTOBUF, JSON = "application/x-protobuf", "application/json"
MAX_BODY_BYTES = 8 << 20  # of a fleet request: a header of at most 4 MiB (MAX_CLIENT_HEADER_BYTES), in base64
MAX_REPORT_BYTES = 1 << 10  # of a crash report
MAX_DIGITS = 15  # of a body's size
BODY_SECONDS = 30.0  # for a small request's body
MAX_TOKEN_CHARACTERS = 64
PULL_SECONDS = 1.0  # maximum time a pull stays open; also bounds how long a client takes to stop
ALTERED = (401, json.dumps({"detail": "the body is not the one that was signed"}).encode())
WORKERS = 8
WRITERS = 4


class FleetApp:
    """The ASGI app.

    Args:
        engine: serves the fleet routes and knows the nodes.
        routes: names of the fleet routes.
        admission: authenticates requests, and enrolls stores.
        blobs: the blobs that nodes may fetch, and the destination of uploads.
        health: the content of `GET /fedshelf/health`.
        hold: maximum seconds that a wait stays open.
        grace: seconds a disconnected client has to reconnect before it counts as gone.
    """

    def __init__(
        self, engine: "FlowerEngine", routes: Collection[str], admission: Admission, blobs: Blobs, *,
        health: Mapping[str, Any], hold: float, grace: float,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._routes = routes
        self._admission = admission
        self._health = health
        self._hold = hold
        self._grace = grace
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="fedshelf-fleet")
        # A separate pool, so that a slow disk does not delay messages.
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="fedshelf-bodies")
        self._blobs = BlobRoutes(blobs, self._writers)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._message_events: dict[int, asyncio.Event] = {}  # by node: set when a message may be available
        self._ending = asyncio.Event()
        self._last_wait: dict[int, float] = {}
        self._crash_tokens: dict[int, bytes] = {}  # by node: authenticates its crash report
        self._end = ""
        self._wrong_clocks: set[str] = set()  # names of the stores that were warned about

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await receive()
            await send({"type": "websocket.close", "code": 1000})

    def notify(self, node_id: int) -> None:
        """Notify a node that a message is available. Thread-safe."""
        self.call_soon(lambda: self._message_event(node_id).set())

    def announce_end(self, reason: str) -> None:
        """Notify all clients that the run has ended. Thread-safe."""
        self._end = reason
        self.call_soon(self._wake_all_clients)

    def close(self) -> None:
        """Release all waiting clients because the server is stopping. Thread-safe."""
        self.call_soon(self._wake_all_clients)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        self._loop = asyncio.get_running_loop()
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._loop = None
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._writers.shutdown(wait=True, cancel_futures=True)
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        if method == "GET" and path in ("/healthz", "/fedshelf/health"):
            await answer(send, 200, _json({**self._health, "time": clock()}))
        elif (method, path) == ("GET", "/fedshelf/authority"):
            await answer(send, 200, self._admission.authority())
        elif (method, path) == ("POST", "/fedshelf/enroll"):
            body = await _read(scope, receive, send, limit=MAX_ENROLLMENT_BYTES)
            if body is not None:
                await answer(send, *await self._in_thread(lambda: self._admission.enroll(_peer(scope), body)))
        elif (method, path) == ("POST", "/fedshelf/died"):
            await self._died(scope, receive, send)
        else:
            await self._signed(method, path, scope, receive, send)

    async def _signed(self, method: str, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request that must be signed."""
        query = scope.get("query_string", b"")
        target = (scope["raw_path"] + (b"?" + query if query else b"")).decode("latin-1")
        headers, state, renews = dict(scope["headers"]), scope.get("state", {}), path == "/fedshelf/renew"
        try:
            caller = await asyncio.get_running_loop().run_in_executor(
                self._workers,
                lambda: self._admission.authenticate(method, target, headers, state.get("certified"), renews=renews),
            )
        except UnauthenticatedError as refusal:
            self._admission.refused(_peer(scope), str(refusal))
            await answer(send, 403 if refusal.is_final else 401, reason=printable(str(refusal)))
            return
        except FedShelfError as error:
            logger.error("requests cannot be authenticated: %s", error)
            await answer(send, 503, reason="the server cannot authenticate anybody at the moment")
            return
        if not state.get("admit", lambda name: True)(caller.name):
            self._admission.limited(_peer(scope), caller, "too many connections")
            await answer(send, 429, reason=f"'{printable(caller.name)}' has too many connections")
        elif (method, path) == ("GET", "/fedshelf/roster"):
            self._compare_clocks(caller, headers.get(CLOCK_HEADER.encode(), b""))
            await answer(send, *await self._in_thread(self._admission.roster))
        elif method == "POST" and renews:
            await self._small(self._admission.renew, JSON, caller, scope, receive, send, limit=MAX_ENROLLMENT_BYTES)
        elif (method, path) == ("POST", "/fedshelf/wait"):
            await self._wait(caller, headers, receive, send)
        elif method == "POST" and path.startswith(PREFIX) and path.removeprefix(PREFIX) in self._routes:
            route = path.removeprefix(PREFIX)
            await self._small(
                lambda *request: self._engine.serve(route, *request), PROTOBUF, caller, scope, receive, send
            )
        elif (method, path) == ("POST", "/fedshelf/pull"):
            await self._pull(caller, scope, receive, send)
        elif (method, path) == ("POST", "/fedshelf/push"):
            await self._small(self._engine.push, JSON, caller, scope, receive, send)
        elif named := BLOB_PATH.fullmatch(path):
            await self._body(named[1], caller, scope, receive, send)
        else:
            await answer(send, 404, reason="not found")

    def _compare_clocks(self, caller: Caller, told: bytes) -> None:
        """Warn, once for each store, of a clock that differs from this server's."""
        digits = told.removeprefix(b"-")
        if not digits.isdigit() or len(digits) > MAX_DIGITS:
            return
        problem = clock_problem(f"{printable(caller.name)}: its", int(told), "this server's")
        if problem and caller.name not in self._wrong_clocks:
            logger.warning("%s", problem)
        (self._wrong_clocks.add if problem else self._wrong_clocks.discard)(caller.name)

    async def _small(
        self, serve: Callable[[Caller, bytes], tuple[int, bytes]], content_type: str, caller: Caller, scope: Scope,
        receive: Receive, send: Send, *, limit: int = MAX_BODY_BYTES,
    ) -> None:  # fmt: skip
        """Read a small request whole and answer it from a worker thread."""
        body = await _read(scope, receive, send, limit=limit)
        if body is not None:
            status, content = await self._in_thread(lambda: serve(caller, body) if caller.sent(body) else ALTERED)
            await answer(send, status, content, {"content-type": content_type if status == 200 else JSON})

    async def _pull(self, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read(scope, receive, send)
        if body is None:
            return
        node_id = self._engine.node_of(caller)
        message_event = asyncio.Event() if node_id is None else self._message_event(node_id)
        message_event.clear()
        status, content = await self._in_thread(
            lambda: self._engine.pull(caller, body) if caller.sent(body) else ALTERED
        )
        if (status, content) == (200, b""):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PULL_SECONDS):
                    await message_event.wait()
                status, content = await self._in_thread(lambda: self._engine.pull(caller, body))
        await answer(send, status, content)

    def _in_thread(self, work: Callable[[], tuple[int, bytes]]) -> "asyncio.Future[tuple[int, bytes]]":
        return asyncio.get_running_loop().run_in_executor(self._workers, work)

    async def _body(self, digest: str, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        node_id = self._engine.node_of(caller)
        if node_id is None:
            await answer(send, 401, reason="unknown session")
        else:
            over = partial(self._admission.limited, _peer(scope), caller)
            await self._blobs.serve(node_id, digest, scope, receive, send, over)

    async def _wait(self, caller: Caller, headers: Mapping[bytes, bytes], receive: Receive, send: Send) -> None:
        node_id = self._engine.node_of(caller)
        if node_id is None:
            await answer(send, 401, reason="unknown session")
            return
        self._seen(node_id)
        self._crash_tokens[node_id] = headers.get(TOKEN_HEADER.encode(), b"")[:MAX_TOKEN_CHARACTERS]
        hang_up = asyncio.ensure_future(_until_disconnect(receive))
        ending = asyncio.ensure_future(self._ending.wait())
        await asyncio.wait({hang_up, ending}, timeout=self._hold, return_when=asyncio.FIRST_COMPLETED)
        hung_up = hang_up.done()
        hang_up.cancel()
        ending.cancel()
        if hung_up:
            asyncio.get_running_loop().call_later(self._grace, self._check, node_id, time.monotonic())
            return
        await answer(send, 200, _json({"end": self._end}))

    async def _died(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read(scope, receive, send, limit=MAX_REPORT_BYTES)
        if body is None:
            return
        try:
            report = json.loads(body)
            token, by = str(report["token"]).encode(), str(report["signal"])
        except (ValueError, TypeError, KeyError, RecursionError):
            token, by = b"", ""
        nodes = [node for node, known in self._crash_tokens.items() if token and hmac.compare_digest(known, token)]
        for node_id in nodes:
            self._forget(node_id)
            self._engine.lost(node_id, by if by in SIGNALS.values() else "")
        await answer(send, 200 if nodes else 404, _json({}))

    def call_soon(self, action: Callable[[], None]) -> None:
        """Run `action` in the event loop if the app is still serving. Thread-safe."""
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # closed just now: no client is waiting
                loop.call_soon_threadsafe(action)

    def _wake_all_clients(self) -> None:
        self._ending.set()
        for message_event in self._message_events.values():
            message_event.set()

    def _message_event(self, node_id: int) -> asyncio.Event:
        return self._message_events.setdefault(node_id, asyncio.Event())

    def _seen(self, node_id: int) -> None:
        self._last_wait[node_id] = time.monotonic()
        self._engine.seen(node_id)

    def _check(self, node_id: int, hung_up_at: float) -> None:
        if self._last_wait.get(node_id, 0.0) <= hung_up_at:
            self._forget(node_id)
            self._engine.lost(node_id)

    def _forget(self, node_id: int) -> None:
        self._message_events.pop(node_id, None)
        self._last_wait.pop(node_id, None)
        self._crash_tokens.pop(node_id, None)


async def _read(scope: Scope, receive: Receive, send: Send, *, limit: int = MAX_BODY_BYTES) -> bytes | None:
    """Read the request's body; return None after answering a body that is too large, incomplete or too slow."""
    announced = dict(scope["headers"]).get(b"content-length", b"0")
    too_large = not announced.isdigit() or len(announced) > MAX_DIGITS or int(announced) > limit
    body = None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(BODY_SECONDS):
            body = None if too_large else await _read_all(receive, limit)
    if body is None:
        logger.warning(
            "%s: a request to %s was cut off, slow, or larger than %d bytes", _peer(scope), printable(scope["path"]),
            limit,
        )  # fmt: skip
        await answer(send, 413, reason=f"the request is larger than {limit} bytes")
    return body


async def _read_all(receive: Receive, limit: int) -> bytes | None:
    chunks, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        more = message.get("more_body", False)
        if size > limit:
            return None
    return b"".join(chunks)


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).encode()


def _peer(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else "somebody"
