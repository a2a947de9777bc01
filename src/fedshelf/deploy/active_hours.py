"""Waits until a client's active hours allow it to work."""

import threading
import time
from collections.abc import Callable

from fedshelf.reporting import formatting as words
from fedshelf.scheduling.active_hours import ActiveHours

NAP_SECONDS = 30.0  # the clock may be set, or the machine suspended, during a sleep


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
