"""Backends that run simulated clients: in this process, in workers, or on Ray."""

from collections import deque
from typing import Protocol

from fedshelf.core.messages import ClientMessage, ServerMessage


class Backend(Protocol):
    """Runs clients, in this process or in others."""

    def submit(self, name: str, message: ServerMessage) -> None:
        """Accept a message for client `name`; may start computing."""

    def next(self) -> tuple[str, ClientMessage] | None:
        """Return the next client and its answer, or None if there is no work."""


class InProcess:
    """A backend that computes each answer when it is requested.

    Args:
        run: handles a message as a client.
    """

    def __init__(self, run: "RunMessage") -> None:
        self._run = run
        self._queue: deque[tuple[str, ServerMessage]] = deque()

    def submit(self, name: str, message: ServerMessage) -> None:
        """See `Backend`."""
        self._queue.append((name, message))

    def next(self) -> tuple[str, ClientMessage] | None:
        """See `Backend`."""
        if not self._queue:
            return None
        name, message = self._queue.popleft()
        return name, self._run(name, message)


class RunMessage(Protocol):
    """Handles a message as the named client; a failure of the client is an answer, too."""

    def __call__(self, name: str, message: ServerMessage) -> ClientMessage: ...
