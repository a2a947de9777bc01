"""An HTTP server with limits, which uvicorn and httptools do not have.

A peer that has not been authenticated has little time and few connections; a store has a number of connections of its
own. So strangers cannot use up the connections, files or memory that stores and the run itself need.
"""

import asyncio
import errno
import logging
import resource
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fedshelf.deploy.admission import certified_key

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 16 << 10  # of a request: method, path and headers
MAX_HEADERS = 64
REQUEST_SECONDS = 10.0  # for a TLS handshake, a request's head, and a stranger's next request
MAX_STRANGERS = 256  # connections without an authenticated request
MAX_STRANGERS_PER_ADDRESS = 64
MAX_PER_STORE = 8
RESERVED_FILES = 256  # descriptors for the run's own files
WANTED_FILES = 8192
PAUSE_SECONDS = 0.1  # after the system could not accept a connection
PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED})

Count = Callable[[str, str], None]
"""Counts an event that a stranger can cause, by kind and address."""


class Connections:
    """Counts a server's connections, on its event loop.

    Args:
        count: receives refused connections and failed handshakes.
    """

    def __init__(self, count: Count) -> None:
        self.count = count
        self._most = raise_file_limit() - RESERVED_FILES
        self._strangers: Counter[str] = Counter()
        self._stores: Counter[str] = Counter()

    def open(self, address: str) -> "Slot | None":
        """Count a new connection; None if it is one too many."""
        strangers = self._strangers.total()
        if (
            strangers >= MAX_STRANGERS
            or strangers + self._stores.total() >= self._most
            or self._strangers[address] >= MAX_STRANGERS_PER_ADDRESS
        ):
            self.count("too many connections", address)
            return None
        self._strangers[address] += 1
        return Slot(self, address)

    def admit(self, address: str, store: str) -> bool:
        """Count a stranger's connection as a store's; whether the store may have it."""
        self.close(address, "")
        self._stores[store] += 1
        return self._stores[store] <= MAX_PER_STORE

    def close(self, address: str, store: str) -> None:
        """Count a connection no longer."""
        counter, key = (self._stores, store) if store else (self._strangers, address)
        counter[key] -= 1
        if not counter[key]:
            del counter[key]


class Slot:
    """A counted connection.

    Args:
        connections: what counts it.
        address: the peer's address.
    """

    def __init__(self, connections: Connections, address: str) -> None:
        self._connections = connections
        self.address = address
        self.store = ""
        self._is_open = True

    def admit(self, store: str) -> bool:
        """Note that a request of the connection was authenticated; whether the connection may stay."""
        if self.store or not self._is_open:
            return True
        self.store = store
        return self._connections.admit(self.address, store)

    def close(self) -> None:
        """Count the connection no longer. A second call does nothing."""
        if self._is_open:
            self._is_open = False
            self._connections.close(self.address, self.store)

    def failed(self, what: str) -> None:
        """Count a fault of this peer."""
        self._connections.count(what, self.address)


class LimitedServer(uvicorn.Server):  # type: ignore[misc]  # mypy does not follow imports into uvicorn
    """uvicorn's server, with its own way of accepting connections.

    Args:
        config: uvicorn's configuration.
        connections: counts connections.
    """

    def __init__(self, config: uvicorn.Config, connections: Connections) -> None:
        super().__init__(config)
        self._connections = connections

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections on `sockets`."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            self.should_exit = True
            return
        self.servers: list[Any] = [_Acceptor(sock, self, self._connections) for sock in sockets or ()]
        self.started = True


class _Acceptor:
    """Accepts connections, until `close`; what uvicorn needs of an `asyncio.Server`."""

    def __init__(self, listener: socket.socket, server: LimitedServer, connections: Connections) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._server = server
        self._connections = connections
        self._starting: dict[asyncio.Task[None], socket.socket] = {}
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run())

    def close(self) -> None:
        for task in (self._task, *self._starting):
            task.cancel()

    async def wait_closed(self) -> None:
        await asyncio.gather(self._task, *self._starting, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            accepting = asyncio.ensure_future(self._loop.sock_accept(self._listener))
            accepting.add_done_callback(self._close_if_closing)
            try:
                sock, peer = await accepting
            except OSError as error:
                if error.errno not in PASSING:
                    raise
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            slot = self._connections.open(str(peer[0]))
            if slot is None:
                sock.close()
                continue
            task = self._loop.create_task(self._start(sock, slot))
            self._starting[task] = sock
            task.add_done_callback(self._started)

    def _started(self, task: "asyncio.Task[None]") -> None:
        sock = self._starting.pop(task)
        if task.cancelled():  # before it began
            sock.close()

    def _close_if_closing(self, accepting: "asyncio.Future[tuple[socket.socket, Any]]") -> None:
        """Close what was accepted while the server was being closed."""
        if self._task.cancelling() and not accepting.cancelled() and accepting.exception() is None:
            accepting.result()[0].close()

    async def _start(self, sock: socket.socket, slot: Slot) -> None:
        config = self._server.config
        try:
            await self._loop.connect_accepted_socket(
                lambda: Connection(
                    slot, config=config, server_state=self._server.server_state,
                    app_state=self._server.lifespan.state,
                ),
                sock, ssl=config.ssl, ssl_handshake_timeout=REQUEST_SECONDS if config.ssl else None,
            )  # fmt: skip
        except (OSError, ssl.SSLError, asyncio.CancelledError) as error:
            slot.failed("handshake failed")
            slot.close()
            sock.close()
            logger.debug("%s: no TLS connection: %s", slot.address, error)


class Connection(HttpToolsProtocol):  # type: ignore[misc]
    """One connection.

    Args:
        slot: its place among the connections.
        **uvicorn: uvicorn's arguments.
    """

    def __init__(self, slot: Slot, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._slot = slot
        self._certified: str | None = None
        self._head_bytes = 0
        self._in_head = True
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin with a stranger."""
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        self._certified = certified_key(tls.getpeercert(binary_form=True)) if tls else None
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        super().connection_lost(exc)
        self._stop_timer()
        self._slot.close()

    def data_received(self, data: bytes) -> None:
        """Hand data to the parser; a head only up to `MAX_HEAD_BYTES`."""
        if self._in_head:
            self._head_bytes += len(data)
            if self._timer is None:
                self._start_timer()
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._cut_off("head too large")

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self.scope["state"] = {"certified": self._certified, "admit": self._slot.admit}

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header, unless there are too many."""
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self._cut_off("too many headers")
        elif len(self.url) + sum(len(part) for header in self.headers for part in header) > MAX_HEAD_BYTES:
            self._cut_off("head too large")

    def on_headers_complete(self) -> None:
        """Answer the request, whose body may follow."""
        self._in_head, self._head_bytes = False, 0
        self._stop_timer()
        if not self.transport.is_closing():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """What comes now is the head of the next request."""
        self._in_head = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for the next request: for a stranger's not for long."""
        super().on_response_complete()
        if not self._slot.store and not self.transport.is_closing():
            self._start_timer()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(REQUEST_SECONDS, self._cut_off, "too slow")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _cut_off(self, why: str) -> None:
        if not self.transport.is_closing():
            self._slot.failed(why)
            self.transport.abort()


def raise_file_limit() -> int:
    """Raise this process's limit of open files to what a server may need.

    Returns:
        The limit, at most `WANTED_FILES`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted if soft == resource.RLIM_INFINITY else min(max(soft, wanted), WANTED_FILES)
