"""What plays simulated clients: in this process, in workers, or on Ray."""

from collections import deque
from typing import Protocol

from fedshelf.core.messages import ClientMessage, ServerMessage


class Backend(Protocol):
    """Plays clients, in this process or in others."""

    def submit(self, name: str, message: ServerMessage) -> None:
        """Take work on; may start it."""

    def next(self) -> tuple[str, ClientMessage] | None:
        """The next finished answer; None if there is no work."""


class InProcess:
    """A backend that computes each answer when it is asked for."""

    def __init__(self, run: "RunMessage") -> None:
        self._play = run
        self._queue: deque[tuple[str, ServerMessage]] = deque()

    def submit(self, name: str, message: ServerMessage) -> None:
        self._queue.append((name, message))

    def next(self) -> tuple[str, ClientMessage] | None:
        if not self._queue:
            return None
        name, message = self._queue.popleft()
        return name, self._play(name, message)


class RunMessage(Protocol):
    """Answers a message as the client of that name would; a client's failure is an answer, too."""

    def __call__(self, name: str, message: ServerMessage) -> ClientMessage: ...
