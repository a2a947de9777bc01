"""Limits on the head of a request, which uvicorn and httptools do not have.

A peer that sends a head slowly, or none at all, would otherwise hold one of the server's few connections.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 10.0
"""Time for a request's head, from its first byte, or from the beginning of the connection."""
MAX_HEAD_BYTES = 16 << 10


class Connection(HttpToolsProtocol):  # type: ignore[misc]  # mypy does not follow imports into uvicorn
    """One connection.

    Args:
        **uvicorn: uvicorn's arguments.
    """

    def __init__(self, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._in_head, self._head_bytes = True, 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Wait for the first request."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Hand data to the parser; a head only up to `MAX_HEAD_BYTES`."""
        if self._in_head:
            self._head_bytes += min(len(data), MAX_HEAD_BYTES)
        super().data_received(data)
        if self._in_head and self._head_bytes >= MAX_HEAD_BYTES:
            self.transport.abort()

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._start_timer()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is whole; the body has limits of its own."""
        self._in_head, self._head_bytes = False, 0
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """What comes now is the head of the next request."""
        self._in_head = True
        super().on_message_complete()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
