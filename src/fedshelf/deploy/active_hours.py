"""Waiting until a store's hours let its client work."""

import threading
import time
from collections.abc import Callable

from fedshelf.reporting import formatting as words
from fedshelf.scheduling.active_hours import ActiveHours

NAP_SECONDS = 30.0  # the clock may be set, or the machine be suspended, while somebody sleeps by it


class Availability:
    """Whether a client may work now, and the wait until it may.

    Args:
        hours: when it may; None is always.
        now: seconds since 1970.
    """

    def __init__(self, hours: ActiveHours | None = None, now: Callable[[], float] = time.time) -> None:
        self._hours = hours
        self._now = now

    def is_open(self) -> bool:
        return self._hours is None or self._hours.is_open(self._now())

    def wait(self, stop: threading.Event, on_status: Callable[[str], None]) -> float:
        """Sleep until it is open, or `stop` is set; returns the seconds that this took."""
        if self._hours is None:
            return 0.0
        started, told = time.monotonic(), False
        while not stop.is_set():
            now = self._now()
            if self._hours.is_open(now):
                break
            opens = self._hours.next_change(now)
            if not told:
                at, left = self._hours.clock(opens), words.duration(opens - now)
                on_status(f"outside of its hours ({self._hours}): it joins at {at}, in {left}")
                told = True
            stop.wait(min(NAP_SECONDS, opens - now))
        return time.monotonic() - started
