"""How a client waits: until its active hours, and with reports of what it waits for, since when, and what to do."""

import math
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from fedshelf.reporting.formatting import duration
from fedshelf.scheduling.active_hours import ActiveHours

FIRST_SECONDS = 10.0  # a shorter wait is not reported
MAX_INTERVAL = 3600.0
LOOK_SECONDS = 0.5
NAP_SECONDS = 30.0  # the clock may be set, or the machine suspended, during a sleep


class Repetitions:
    """Limits repeated messages to intervals that double up to an hour, and reset after a long quiet time.

    Args:
        first: the first interval in seconds.
        clock: returns seconds; only differences matter.
    """

    def __init__(self, first: float = FIRST_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._first = first
        self._clock = clock
        self._said: dict[str, tuple[float, float]] = {}  # time of the last report, and the interval after it

    def allow(self, what: str) -> bool:
        """Whether to report `what` now; if so, it is recorded as reported."""
        now = self._clock()
        before, interval = self._said.get(what, (-math.inf, 0.0))
        if now - before < interval:
            return False
        recently = now - before < 2 * interval + self._first
        self._said[what] = now, min(2 * interval, MAX_INTERVAL) if recently else self._first
        return True


class WaitReporter:
    """Reports a wait after 10 s and then at growing intervals (see `Repetitions`), including after brief interruptions.

    A context manager that reports from its own thread, so that a blocked call is reported, too. Thread-safe.

    Args:
        say: receives one line for the user.
        first: seconds before the first report.
        clock: returns seconds; only differences matter.
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

    def begin(self, what: str, advice: str = "", *, otherwise: str = "") -> None:
        """Start waiting for `what`, or continue that wait.

        Args:
            what: for example `the server at 10.0.0.1:8080`.
            advice: the known cause and what to do; if empty, the previous advice is kept.
            otherwise: advice if there is no other.
        """
        with self._lock:
            if what != self._what:
                self._what, self._advice, self._since = what, "", self._clock()
                self._began = time.strftime("%Y-%m-%d %H:%M:%S")
            self._advice = advice or self._advice or otherwise

    def end(self) -> None:
        """End the wait."""
        with self._lock:
            self._what = ""

    def look(self) -> None:
        """Report the wait if it is time to."""
        with self._lock:
            waited = self._clock() - self._since
            if not self._what or waited < self._first or not self._repetitions.allow(self._what):
                return
            text = f"waiting for {self._what} ({duration(waited, digits=0)} so far, since {self._began})"
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


class Availability:
    """Tells whether a client may work now, and waits until it may.

    Args:
        hours: the active hours; None means always.
        now: returns the time in seconds since 1970.
    """

    def __init__(self, hours: ActiveHours | None = None, now: Callable[[], float] = time.time) -> None:
        self._hours = hours
        self._now = now

    def is_open(self) -> bool:
        """Whether the client may work now."""
        return self._hours is None or self._hours.is_open(self._now())

    def wait(self, stop: threading.Event, on_status: Callable[[str], None]) -> float:
        """Sleep until the active hours begin or `stop` is set.

        Args:
            stop: ends the wait early.
            on_status: receives status lines for the user.

        Returns:
            The seconds spent waiting.
        """
        if self._hours is None:
            return 0.0
        started, announced = time.monotonic(), False
        while not stop.is_set():
            now = self._now()
            if self._hours.is_open(now):
                break
            opens = self._hours.next_change(now)
            if not announced:
                at, left = self._hours.clock(opens), duration(opens - now)
                on_status(f"outside of its hours ({self._hours}): it joins at {at}, in {left}")
                announced = True
            stop.wait(min(NAP_SECONDS, opens - now))
        return time.monotonic() - started
