"""The hours against a clock that is read minute by minute."""

from collections.abc import Callable
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from hypothesis import example, given
from hypothesis import strategies as st

from fedshelf.scheduling.active_hours import DAY, HORIZON, ActiveHours, active_hours

ZONES = (
    "UTC", "Europe/Berlin", "America/New_York", "America/St_Johns", "Asia/Kolkata", "Australia/Lord_Howe",
    "Africa/Casablanca", "Pacific/Apia", "Pacific/Chatham",
)  # fmt: skip
CLOCKS_SET = [
    datetime.fromisoformat(text).timestamp()
    for text in (
        "2026-03-29T01:00Z", "2026-10-25T01:00Z",  # Berlin
        "2026-03-08T07:00Z", "2026-11-01T06:00Z",  # New York
        "2026-04-04T15:00Z", "2026-10-03T15:30Z",  # Lord Howe: by half an hour
        "2026-02-15T02:00Z", "2026-03-22T02:00Z",  # Casablanca: for Ramadan
        "2011-12-30T10:00Z",  # Apia left out a day
    )
]  # fmt: skip

moments = st.one_of(
    st.integers(1_293_840_000, 1_924_992_000),  # 2011 to 2030
    st.builds(
        lambda at, minutes: int(at) + 60 * minutes, st.sampled_from(CLOCKS_SET), st.integers(-3 * 1440, 3 * 1440)
    ),
)
minutes_of_day = st.integers(0, 1439)
windows = st.tuples(minutes_of_day, st.integers(0, 1440)).filter(lambda w: w[0] != w[1])


def written(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"


def hours_of(found: list[tuple[int, int]], zone: str) -> ActiveHours:
    made = active_hours(",".join(f"{written(start)}-{written(end)}" for start, end in found), zone)
    assert made is not None
    return made


def oracle(found: list[tuple[int, int]], zone: str) -> Callable[[int], bool]:
    """Whether the wall clock shows a time in a window, by comparing texts."""

    def is_open(at: int) -> bool:
        shown = f"{datetime.fromtimestamp(at, ZoneInfo(zone)):%H:%M}"
        for start, end in ((written(start), written(end)) for start, end in found):
            if (start <= shown < end) if start < end else (shown >= start or shown < end):
                return True
        return False

    return is_open


@given(st.lists(windows, min_size=1, max_size=3), st.sampled_from(ZONES), moments)
@example([(150, 170)], "Europe/Berlin", 1_774_742_400)  # in the hour that is left out: not on that day
@example([(135, 165)], "Europe/Berlin", 1_792_886_400)  # in the hour that comes twice
@example([(1320, 150)], "Europe/Berlin", 1_792_886_400)
@example([(0, 1440)], "Europe/Berlin", 1_774_742_400)
@example([(0, 720), (720, 1440)], "UTC", 1_774_742_400)
def test_they_open_and_close_at_the_minute_at_which_a_clock_read_each_minute_says_so(
    found: list[tuple[int, int]], zone: str, at: int
) -> None:
    hours, is_open = hours_of(found, zone), oracle(found, zone)
    minute = at - at % 60
    assert hours.is_open(at) == is_open(minute)
    change = next((m for m in range(minute + 60, minute + HORIZON, 60) if is_open(m) != is_open(minute)), None)
    if change is None:
        assert hours.next_change(at) >= at + HORIZON - DAY
    else:
        assert hours.next_change(at) == change


@given(st.lists(windows, min_size=1, max_size=3), st.sampled_from(ZONES), moments, st.integers(0, 59))
def test_a_change_is_at_its_first_second_and_seen_from_any_moment_before(
    found: list[tuple[int, int]], zone: str, at: int, offset: int
) -> None:
    hours = hours_of(found, zone)
    change = hours.next_change(at + 0.25)
    assert change > at
    if change < at + HORIZON - DAY:
        assert hours.is_open(change) != hours.is_open(at) == hours.is_open(change - 1)
        between = at + (change - at) * offset // 60
        assert hours.next_change(between) == change


@given(windows, moments)
def test_a_machine_whose_own_clock_is_universal_time_needs_no_zone(window: tuple[int, int], at: int) -> None:
    found = hours_of([window], "UTC")
    shown = datetime.fromtimestamp(at, UTC)
    assert found.clock(at) == (f"{shown:%H:%M:%S}" if shown.second else f"{shown:%H:%M}")
