"""Waiting for a store's hours, by a clock of the test's own."""

import threading
import time

from fedshelf.deploy.waiting import NAP_SECONDS, Availability
from fedshelf.scheduling.active_hours import DAY, active_hours

NOON = 20_000 * DAY + 12 * 3600


class Naps(threading.Event):
    """A `stop` that nobody waits for in earnest: the test's clock goes on by the time asked for, and by `more`."""

    def __init__(self, more: float = 0.0) -> None:
        super().__init__()
        self.now = float(NOON)
        self.naps: list[float] = []
        self._more = more

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        assert timeout > 0
        self.naps.append(timeout)
        self.now += timeout + self._more
        return self.is_set()


def opened(text: str, stop: Naps) -> tuple[float, list[str]]:
    """The moment at which a door of these hours lets somebody in who comes at noon, and what it says meanwhile."""
    said: list[str] = []
    Availability(active_hours(text, "UTC"), lambda: stop.now).wait(stop, said.append)
    return stop.now, said


def test_it_opens_to_the_second_and_says_once_when() -> None:
    stop = Naps()
    moment, said = opened("13:30:10-14:00", stop)
    assert moment == NOON + 5410
    assert max(stop.naps) <= NAP_SECONDS, "a clock that is set meanwhile would not be noticed"
    assert said == ["outside of its hours (13:30:10-14:00, UTC): it joins at 13:30:10, in 1 h 30 min"]


def test_a_machine_that_slept_meanwhile_opens_when_it_wakes() -> None:
    stop = Naps(more=8 * 3600.0)
    moment, _ = opened("19:00-23:00", stop)
    assert moment == NOON + 8 * 3600 + NAP_SECONDS
    assert len(stop.naps) == 1


def test_an_open_door_is_passed_at_once() -> None:
    stop = Naps()
    assert opened("11:00-12:00:01", stop) == (NOON, [])
    assert Availability().is_open()
    assert Availability().wait(stop, print) == 0.0
    assert stop.naps == []


def test_somebody_who_waits_can_be_called_off_at_once() -> None:
    stop, said = threading.Event(), threading.Event()
    availability = Availability(active_hours("13:00-14:00", "UTC"), lambda: NOON)
    waiter = threading.Thread(target=availability.wait, args=(stop, lambda text: said.set()))
    waiter.start()
    assert said.wait(60)
    stop.set()
    waiter.join(NAP_SECONDS - 5)
    assert not waiter.is_alive()


def test_the_wait_is_measured_by_a_clock_that_nobody_sets() -> None:
    """The wall clock goes an hour on; hardly any time passes."""
    stop = Naps()
    started = time.monotonic()
    waited = Availability(active_hours("13:00-14:00", "UTC"), lambda: stop.now).wait(stop, print)
    assert 0 < waited <= time.monotonic() - started
