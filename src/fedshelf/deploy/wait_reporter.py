"""A client that waits says so: what for, since when, and what to do."""

import math
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from fedshelf.reporting.formatting import duration

FIRST_SECONDS = 10.0  # a shorter wait needs no word
MAX_INTERVAL = 3600.0
LOOK_SECONDS = 0.5


class Repetitions:
    """What comes again and again is said at intervals that double up to an hour; after a long quiet time, at once.

    Args:
        first: seconds after which something may be said again for the first time.
        clock: seconds; only differences count.
    """

    def __init__(self, first: float = FIRST_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._first = first
        self._clock = clock
        self._said: dict[str, tuple[float, float]] = {}  # when last, and the interval from then on

    def allow(self, what: str) -> bool:
        """Whether `what` is to be said now; then it counts as said."""
        now = self._clock()
        before, interval = self._said.get(what, (-math.inf, 0.0))
        if now - before < interval:
            return False
        recently = now - before < 2 * interval + self._first
        self._said[what] = now, min(2 * interval, MAX_INTERVAL) if recently else self._first
        return True


class WaitReporter:
    """Speaks when a wait has taken 10 s, and then at growing intervals (see `Repetitions`), also where the wait was
    interrupted for a short time.

    A context manager, within which a thread of its own speaks, so that a blocked call is reported, too. Any thread may
    change what is awaited.

    Args:
        say: told one line for a person.
        first: seconds of a wait that need no word.
        clock: seconds; only differences count.
    """

    def __init__(
        self, say: Callable[[str], None], *, first: float = FIRST_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say = say
        self._first = first
        self._clock = clock
        self._lock = threading.Lock()
        self._what, self._advice, self._began, self._since = "", "", "", 0.0
        self._repetitions = Repetitions(first, clock)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fedshelf-waiting", daemon=True)

    def begin(self, what: str, advice: str = "") -> None:
        """Wait for `what`; where it is awaited already, that wait continues.

        Args:
            what: for example `the server at 10.0.0.1:8080`.
            advice: what is known of the cause, and what to do; empty leaves what was said before.
        """
        with self._lock:
            if what != self._what:
                self._what, self._advice, self._since = what, "", self._clock()
                self._began = time.strftime("%Y-%m-%d %H:%M:%S")
            self._advice = advice or self._advice

    def end(self) -> None:
        """Nothing is awaited any more."""
        with self._lock:
            self._what = ""

    def look(self) -> None:
        """Speak, if it is time to."""
        with self._lock:
            waited = self._clock() - self._since
            if not self._what or waited < self._first or not self._repetitions.allow(self._what):
                return
            text = f"waiting for {self._what} for {duration(waited)}, since {self._began}"
            text += f": {self._advice}" if self._advice else ""
        self._say(text)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            self.look()
