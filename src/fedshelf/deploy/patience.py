"""How long a client waits for its server, and how often it tries again."""

import math
import re
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import TypeVar

from fedshelf.core.errors import TransportError
from fedshelf.deploy.address import Address
from fedshelf.deploy.connection_errors import ServerUnavailableError
from fedshelf.deploy.waiting import Repetitions

PAUSES = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)  # seconds between attempts to join a server
REFUSED_PAUSES = (5.0, 30.0, 60.0, 300.0)  # seconds until a refused client joins again; each time it sets up anew
LAST_ATTEMPT_SECONDS = 1.0  # for an attempt that begins when the maximum wait is almost over

SILENCE_ADVICE = (
    "it has not answered so far; check that a FedShelf server listens there, and the network and firewalls in between"
)

_T = TypeVar("_T")


class Retries:
    """Pauses of increasing length between attempts, with fewer and fewer repeated status lines."""

    def __init__(self, on_status: Callable[[str], None], stop: threading.Event) -> None:
        self._on_status = on_status
        self._stop = stop
        self._repetitions = Repetitions()
        self._last = ""
        self._count = 0
        self._refusals, self._refused_since = 0, ""

    def say(self, text: str) -> None:
        """Report `text` unless it repeats the last line except for its numbers, or was reported recently."""
        key = re.sub(r"\d+", "", text)
        if key != self._last and self._repetitions.allow(key):
            self._on_status(text)
        self._last = key

    def pause(self, longest: float) -> None:
        """Wait before the next attempt, at most `longest` seconds."""
        self._stop.wait(max(0.0, min(longest, PAUSES[min(self._count, len(PAUSES) - 1)])))
        self._count += 1

    def refused(self, reason: str) -> None:
        """Report that the server refuses this client for now, and wait before the next attempt."""
        pause = REFUSED_PAUSES[min(self._refusals, len(REFUSED_PAUSES) - 1)]
        self._refusals += 1
        self._refused_since = self._refused_since or time.strftime("%Y-%m-%d %H:%M:%S")
        self.say(
            f"the server does not let this store take part: {reason}; joining again in {pause:g} s "
            f"(attempt {self._refusals} since {self._refused_since})"
        )
        self._stop.wait(pause)

    def start_over(self) -> None:
        """Reset the pauses after contact with the server."""
        self._count = self._refusals = 0
        self._refused_since = ""


class SilentError(ServerUnavailableError):
    """A request was given up because the maximum wait is over. Its connection is still in use."""


class Patience:
    """The maximum wait for an answer from the server.

    Attributes:
        since: when the wait for an answer began (`time.monotonic`).
    """

    def __init__(self, address: Address, max_wait: float | None) -> None:
        self.since = time.monotonic()
        self._address = address
        self._max_wait = max_wait

    def left(self) -> float:
        """Seconds until the wait is over; infinity without a maximum."""
        return math.inf if self._max_wait is None else self.since + self._max_wait - time.monotonic()

    def check(self, reason: object) -> None:
        """Check that the wait is not over.

        Raises:
            TransportError: it is; the message includes the `reason`.
        """
        if self.left() <= 0:
            raise TransportError(f"the server on {self._address} did not answer for {self._max_wait:g} s ({reason})")

    def bound(
        self, request: Callable[[], _T], *, afterwards: Callable[["futures.Future[_T]"], object],
        least: float = LAST_ATTEMPT_SECONDS, num_moved: Callable[[], int] = lambda: 0,
    ) -> _T:  # fmt: skip
        """Return the result of `request`, and stop waiting for it when the wait is over.

        A timeout of the connection does not suffice: it is about one packet, not about the whole answer.

        Args:
            request: a request to the server.
            afterwards: called with an answer that nobody waited for, in another thread.
            least: seconds that the request has in any case.
            num_moved: bytes transferred so far; progress starts the wait anew.

        Raises:
            ServerUnavailableError: the wait is over.
        """
        if self._max_wait is None:
            return request()
        answer: futures.Future[_T] = futures.Future()

        def work() -> None:
            try:
                answer.set_result(request())
            except BaseException as error:  # noqa: BLE001  raised below
                answer.set_exception(error)

        threading.Thread(target=work, name="fedshelf-request", daemon=True).start()
        moved = num_moved()
        while not futures.wait([answer], max(self.left(), least)).done:
            if num_moved() == moved:
                answer.add_done_callback(afterwards)
                raise SilentError(SILENCE_ADVICE)
            moved, self.since = num_moved(), time.monotonic()
        return answer.result()
