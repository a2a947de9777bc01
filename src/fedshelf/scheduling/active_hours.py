"""The hours in which a store's computer may work, in the store's local time.

Work is allowed whenever local time is in one of the windows. When clocks are set forward, a window loses the skipped
time; when they are set back, it is open both times that the repeated hour occurs.
"""

import difflib
import math
import os
import re
import time
import zoneinfo
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from fedshelf.core.errors import UsageError

DAY = 86_400
CLOCK_CHANGES = 900  # seconds: in every time zone, clocks change at a quarter of an hour
HORIZON = 8 * DAY  # a window in skipped time, or on a skipped day, recurs by then
EXAMPLE = "write START-END by the clock, such as 22:00-06:00, several joined by commas: 12:00-13:30,22:00-06:00"

WELL_KNOWN = frozenset({
    "Europe/Berlin", "Europe/London", "Europe/Helsinki", "America/New_York", "America/Chicago", "America/Denver",
    "America/Los_Angeles", "Asia/Shanghai", "Asia/Kolkata", "Asia/Tokyo", "Australia/Sydney",
})  # fmt: skip
MAX_ABBREVIATION = 5

_OFFSET = re.compile(r"(?:UTC|GMT)?\s*[+-]\s*[0-9:]{1,5}", re.IGNORECASE)
_TIME = r"([0-9]{1,2}):([0-9]{2})(?::([0-9]{2}))?"
_WINDOW = re.compile(rf"\s*{_TIME}\s*-\s*{_TIME}\s*")

Offset = Callable[[int], int]
"""Offset of local time from UTC in seconds, at a time in seconds since 1970."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """A daily window. It spans midnight if `end` is before `start`.

    Attributes:
        start: seconds since midnight, inclusive.
        end: seconds since midnight, exclusive.
    """

    start: int
    end: int

    def holds(self, second: int) -> bool:
        """Whether a second of the day is in the window."""
        if self.start < self.end:
            return self.start <= second < self.end
        return second >= self.start or second < self.end


@dataclass(frozen=True, kw_only=True, slots=True)
class ActiveHours:
    """Daily windows in local time.

    Attributes:
        windows: the windows.
        offset: offset of local time from UTC.
        text: the windows, for display.
        zone: the time zone, for display.
    """

    windows: tuple[Window, ...]
    offset: Offset
    text: str
    zone: str

    def is_open(self, at: float) -> bool:
        """Whether work is allowed at a time (seconds since 1970)."""
        moment = math.floor(at)
        second = (moment + self.offset(moment)) % DAY
        return any(window.holds(second) for window in self.windows)

    def next_change(self, at: float) -> int:
        """The first time after `at` at which the hours open or close; `at` plus `HORIZON` if there is none."""
        before, moment = self.is_open(at), math.floor(at)
        end = moment + HORIZON
        while moment < end:
            moment = self._next_event(moment)
            if self.is_open(moment) != before:
                return moment
        return end

    def clock(self, at: float) -> str:
        """Local time at `at`, for display."""
        moment = math.floor(at)
        shown = datetime.fromtimestamp(moment + self.offset(moment), UTC)
        return f"{shown:%H:%M:%S}" if shown.second else f"{shown:%H:%M}"

    def __str__(self) -> str:
        return f"{self.text}, {self.zone}"

    def _next_event(self, moment: int) -> int:
        """The next time at which a window starts or ends, or the clock may change."""
        second = (moment + self.offset(moment)) % DAY
        edges = {edge for window in self.windows for edge in (window.start, window.end)}
        return moment + min(CLOCK_CHANGES - moment % CLOCK_CHANGES, *((edge - second) % DAY or DAY for edge in edges))


def active_hours(text: str | None, time_zone: str | None) -> ActiveHours | None:
    """Parse `--active-hours` and `--time-zone`.

    Args:
        text: windows such as ``12:00-13:30,22:00-06:00``.
        time_zone: a name from the IANA database, such as ``Europe/Berlin``; None: this machine's time zone.

    Returns:
        The hours; None: at any time.

    Raises:
        UsageError: the windows or the zone are invalid; lists all problems with corrections.
    """
    if text is None:
        if time_zone is not None:
            raise UsageError(f"--time-zone {time_zone} says whose clock --active-hours goes by: give that, too")
        return None
    windows = _windows(text)
    if time_zone is None:
        _check_local_zone()
    offset = _local_offset if time_zone is None else _offset_of(_zone(time_zone))
    return ActiveHours(windows=windows, offset=offset, text=text, zone=time_zone or "this machine's time")


def _windows(text: str) -> tuple[Window, ...]:
    windows, problems = [], []
    for part in text.split(","):
        try:
            windows.append(_window(part))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise UsageError(f"--active-hours {text!r}: {'; '.join(problems)}: {EXAMPLE}")
    return tuple(windows)


def _window(part: str) -> Window:
    match = _WINDOW.fullmatch(part)
    if match is None:
        raise ValueError(f"{part.strip()!r} is no window")
    numbers = [int(group or 0) for group in match.groups()]
    start, end = _second(*numbers[:3]), _second(*numbers[3:])
    if start == DAY:
        raise ValueError(f"{part.strip()!r} begins at 24:00, where a day ends: begin it at 00:00")
    if start == end:
        raise ValueError(
            f"{part.strip()!r} ends where it begins (for the whole day, leave --active-hours out, or write 00:00-24:00)"
        )
    return Window(start=start, end=end)


def _second(hours: int, minutes: int, seconds: int) -> int:
    second = 3600 * hours + 60 * minutes + seconds
    if minutes > 59 or seconds > 59 or second > DAY:
        shown = f"{hours:02}:{minutes:02}" + (f":{seconds:02}" if seconds else "")
        raise ValueError(f"{shown} is no time of day")
    return second


def _zone(name: str) -> zoneinfo.ZoneInfo:
    try:
        return zoneinfo.ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # missing; not a name, or no such file; a folder of zones
        known = sorted(zoneinfo.available_timezones(), key=lambda zone: (zone not in WELL_KNOWN, zone))
    if not known:
        raise UsageError(
            f"--time-zone {name}: this system has no database of time zones; install the package 'tzdata' next to "
            "FedShelf, or leave --time-zone out to go by this machine's own clock"
        )
    if _OFFSET.fullmatch(name.strip()):
        raise UsageError(
            f"--time-zone {name}: an offset is not a time zone, as it does not tell when clocks are changed; write a "
            "place whose clock it is, such as Europe/Berlin"
        )
    if examples := _places_of(name.strip().upper(), known):
        raise UsageError(
            f"--time-zone {name}: an abbreviation is not a time zone; write a place whose clock it is, such as "
            + " or ".join(examples)
        )
    near = _nearest(name, known)
    raise UsageError(
        f"--time-zone {name}: there is no such time zone"
        + (f"; did you mean {near}?" if near else "; write a name such as Europe/Berlin")
    )


def _places_of(abbreviation: str, known: list[str]) -> list[str]:
    """A place for each offset that `abbreviation` stands for (CST is five hours behind, six behind, or eight ahead)."""
    if not (abbreviation.isalpha() and len(abbreviation) <= MAX_ABBREVIATION):
        return []
    year, found = datetime.now(UTC).year, dict[timedelta | None, str]()
    for name in (name for name in known if "/" in name):
        zone = zoneinfo.ZoneInfo(name)
        for moment in (datetime(year, 1, 1, tzinfo=zone), datetime(year, 7, 1, tzinfo=zone)):
            if moment.tzname() == abbreviation:
                found.setdefault(moment.utcoffset(), f"{name} ({moment:UTC%z})")
    return list(found.values())


def _nearest(name: str, known: list[str]) -> str | None:
    """The zone that was probably meant by a city or a misspelled name.

    Abbreviations are not guessed, because one letter can make a difference of hours.
    """
    wanted = name.strip().lower().replace(" ", "_")
    by_name = {zone.lower().rpartition("/")[2]: zone for zone in reversed(known)}
    by_name |= {zone.lower(): zone for zone in known}
    if wanted in by_name:
        return by_name[wanted]
    near = difflib.get_close_matches(wanted, by_name, n=1, cutoff=0.75) if len(wanted) > MAX_ABBREVIATION else []
    return by_name[near[0]] if near else None


def _offset_of(zone: zoneinfo.ZoneInfo) -> Offset:
    def offset(at: int) -> int:
        return int((datetime.fromtimestamp(at, zone).utcoffset() or timedelta()).total_seconds())

    return offset


def _check_local_zone() -> None:
    """Check `TZ`, for which the C library silently replaces invalid values by UTC.

    Raises:
        UsageError: `TZ` is not a time zone.
    """
    name = os.environ.get("TZ", "").removeprefix(":")
    if name and not name.startswith("/") and not any(character.isdigit() for character in name):
        try:
            zoneinfo.ZoneInfo(name)
        except (KeyError, ValueError, OSError):
            raise UsageError(
                f"the environment variable TZ is {name!r}, which is not a time zone: this machine's clock would count "
                "as universal time; set it to a name such as Europe/Berlin, or give --time-zone"
            ) from None


def _local_offset(at: int) -> int:
    return time.localtime(at).tm_gmtoff
