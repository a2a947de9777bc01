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


class WaitReporter:
    """Speaks when a wait has taken 10 s, and then at intervals that double up to an hour. A wait that comes again soon
    goes on with the intervals that it had.

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
        self._spoken: dict[str, tuple[float, float]] = {}  # of what: when last, and the interval from then on
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
            now = self._clock()
            spoken, interval = self._spoken.get(self._what, (-math.inf, 0.0))
            if not self._what or now - self._since < self._first or now - spoken < interval:
                return
            recently = now - spoken < 2 * interval + self._first
            self._spoken[self._what] = now, min(2 * interval, MAX_INTERVAL) if recently else self._first
            text = f"waiting for {self._what} for {duration(now - self._since)}, since {self._began}"
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
