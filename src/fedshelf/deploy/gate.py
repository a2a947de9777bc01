"""The only door of the server: Flower's fleet routes, our own two, and nothing else.

The engine's app also serves routes that start runs, hand out tasks and document themselves; they are not reachable
through here. `POST /fedshelf/wait` is held open until there is something for the client: it is at once the client's
doorbell, its heartbeat and the thread that snaps when its process dies.
"""

import asyncio
import json
import logging
import time
from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

LOG = logging.getLogger(__name__)

Scope: TypeAlias = Any  # the ASGI specification's own types are mappings and callables without a fixed shape
Receive: TypeAlias = Any
Send: TypeAlias = Any

# Fetching the app is left out: our clients bring their own code, nobody downloads any from here.
FLEET_ROUTES = frozenset(
    f"/v1/fleet/{name}"
    for name in (
        "register-node", "activate-node", "deactivate-node", "unregister-node", "send-node-heartbeat",
        "pull-messages", "push-messages", "push-object", "pull-object", "confirm-message-received",
    )
)  # fmt: skip
PUSH_MESSAGES = "/v1/fleet/push-messages"
NEWS = frozenset({"/v1/fleet/push-object", PUSH_MESSAGES, "/v1/fleet/activate-node", "/v1/fleet/deactivate-node"})
# A sign of life makes a node count as online: registering must not (activating does), nor must leaving.
NO_SIGN_OF_LIFE = frozenset(f"/v1/fleet/{name}" for name in ("register-node", "deactivate-node", "unregister-node"))
MAX_BODY_BYTES = 16 << 20  # Flower cuts vectors into objects of 5 MB


class GateKeeper(Protocol):
    """What the gate asks the engine; every call is short."""

    def identify(self, headers: Mapping[bytes, bytes]) -> int | None:
        """The node that signed these headers, or None for nobody registered."""

    def objection(self, push_messages: bytes) -> str:
        """Why these replies may not be pushed, or nothing."""

    def seen(self, node_id: int) -> None:
        """The node gave a sign of life."""

    def lost(self, node_id: int) -> None:
        """The node's connection broke, and it did not come back."""

    def news(self) -> None:
        """Something arrived that the transport may want to look at."""


class Gate:
    """An ASGI app in front of the engine's.

    Args:
        engine: the engine's ASGI app.
        keeper: answers the gate's questions about nodes.
        health: what `GET /fedshelf/health` tells.
        hold: seconds that a wait is held open at most.
        grace: seconds that a client whose connection broke has to come back before it counts as gone.
    """

    def __init__(self, engine: Any, keeper: GateKeeper, *, health: Mapping[str, Any], hold: float, grace: float) -> None:
        self._engine = engine
        self._keeper = keeper
        self._health = health
        self._hold = hold
        self._grace = grace
        self._loop: asyncio.AbstractEventLoop | None = None
        self._bells: dict[int, asyncio.Event] = {}
        self._last_seen: dict[int, float] = {}
        self._end = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._loop = asyncio.get_running_loop()
            await self._engine(scope, receive, send)
        elif scope["type"] != "http":
            await receive()
            await send({"type": "websocket.close", "code": 1000})
        else:
            await self._http(scope, receive, send)

    def ring(self, node_id: int) -> None:
        """Tell the node, from any thread, that there is a message for it."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(lambda: self._bell(node_id).set())

    def announce_end(self, reason: str) -> None:
        """Tell all waiting clients, from any thread, that the run has ended."""
        self._end = reason
        if self._loop is not None:
            self._loop.call_soon_threadsafe(lambda: [bell.set() for bell in self._bells.values()])

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = (scope["method"], scope["path"])
        if route == ("GET", "/fedshelf/health"):
            await _answer(send, 200, self._health)
        elif route == ("POST", "/fedshelf/wait"):
            await self._wait(scope, receive, send)
        elif route[0] == "POST" and route[1] in FLEET_ROUTES:
            await self._fleet(scope, receive, send)
        else:
            await _answer(send, 404, {"detail": "not found"})

    async def _fleet(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        headers = dict(scope["headers"])
        body = await _read(headers, receive)
        if body is None:
            LOG.warning("%s: a request to %s was cut off, or larger than %d bytes", _peer(scope), path, MAX_BODY_BYTES)
            await _answer(send, 413, {"detail": f"the request is larger than {MAX_BODY_BYTES} bytes"})
            return
        if path == PUSH_MESSAGES and (objection := self._keeper.objection(body)):
            LOG.warning("%s sent a reply that is refused: %s", _peer(scope), objection)
            await _answer(send, 403, {"detail": objection})
            return
        status = 0

        async def replay() -> dict[str, Any]:
            nonlocal body
            if body is None:
                message: dict[str, Any] = await receive()
                return message
            message, body = {"type": "http.request", "body": body, "more_body": False}, None
            return message

        async def watched(message: dict[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        await self._engine(scope, replay, watched)
        if status == 200 and path not in NO_SIGN_OF_LIFE and (node_id := self._keeper.identify(headers)) is not None:
            self._seen(node_id)
        if path in NEWS:
            self._keeper.news()

    async def _wait(self, scope: Scope, receive: Receive, send: Send) -> None:
        node_id = self._keeper.identify(dict(scope["headers"]))
        if node_id is None:
            await _answer(send, 401, {"detail": "unknown node"})
            return
        self._seen(node_id)
        bell = self._bell(node_id)
        if self._end:
            bell.set()
        hang_up = asyncio.ensure_future(_until_disconnect(receive))
        rung = asyncio.ensure_future(bell.wait())
        await asyncio.wait({hang_up, rung}, timeout=self._hold, return_when=asyncio.FIRST_COMPLETED)
        hung_up = hang_up.done()
        hang_up.cancel()
        rung.cancel()
        if hung_up:
            asyncio.get_running_loop().call_later(self._grace, self._check, node_id, time.monotonic())
            return
        news = bell.is_set()
        bell.clear()
        self._seen(node_id)
        await _answer(send, 200, {"news": news, "end": self._end})

    def _bell(self, node_id: int) -> asyncio.Event:
        return self._bells.setdefault(node_id, asyncio.Event())

    def _seen(self, node_id: int) -> None:
        self._last_seen[node_id] = time.monotonic()
        self._keeper.seen(node_id)

    def _check(self, node_id: int, hung_up_at: float) -> None:
        if self._last_seen.get(node_id, 0.0) <= hung_up_at:
            self._bells.pop(node_id, None)
            self._last_seen.pop(node_id, None)
            self._keeper.lost(node_id)


async def _read(headers: Mapping[bytes, bytes], receive: Receive) -> bytes | None:
    """The request's body, or None where it is larger than allowed or breaks off."""
    announced = headers.get(b"content-length", b"0")
    if announced.isdigit() and int(announced) > MAX_BODY_BYTES:
        return None
    chunks, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        more = message.get("more_body", False)
        if size > MAX_BODY_BYTES:
            return None
    return b"".join(chunks)


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer(send: Send, status: int, content: Mapping[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _peer(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else "somebody"
