"""`--active-hours` and `--time-zone`, from their text to the moments at which a client works."""

import re
import time
import zoneinfo
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from fedshelf.config import files
from fedshelf.config.schema import ClientConfig
from fedshelf.core.errors import UsageError
from fedshelf.scheduling.active_hours import ActiveHours, Window, active_hours


def hours(text: str, zone: str | None = "Europe/Berlin") -> ActiveHours:
    made = active_hours(text, zone)
    assert made is not None
    return made


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp())


def changes(found: ActiveHours, start: str, count: int) -> list[int]:
    """The next moments at which it opens or closes."""
    moments = [at(start)]
    for _ in range(count):
        moments.append(found.next_change(moments[-1]))
    return moments[1:]


def test_a_window_may_go_over_midnight() -> None:
    night = hours("22:00-06:00")
    assert [night.is_open(at(f"2026-11-21T{clock}+01:00")) for clock in ("21:59:59", "22:00", "05:59:59", "06:00")] == [
        False, True, True, False,
    ]  # fmt: skip
    assert changes(night, "2026-11-21T12:00+01:00", 3) == [
        at("2026-11-21T22:00+01:00"), at("2026-11-22T06:00+01:00"), at("2026-11-22T22:00+01:00"),
    ]  # fmt: skip


def test_several_windows_are_joined_by_commas_and_may_touch_or_overlap() -> None:
    found = hours(" 12:00-13:30 , 22:00-24:00,00:00-06:00,05:00-06:30 ")
    assert changes(found, "2026-11-21T10:00+01:00", 4) == [
        at("2026-11-21T12:00+01:00"), at("2026-11-21T13:30+01:00"), at("2026-11-21T22:00+01:00"),
        at("2026-11-22T06:30+01:00"),
    ]  # fmt: skip


def test_seconds_may_be_said() -> None:
    assert hours("9:05:07-9:05:08").windows == (Window(start=32_707, end=32_708),)


def test_a_window_begins_late_or_not_at_all_where_the_clock_leaves_its_beginning_out() -> None:
    """On 29 March 2026, Berlin's clocks went from 02:00 to 03:00."""
    assert changes(hours("02:30-05:00"), "2026-03-28T12:00Z", 2) == [at("2026-03-29T01:00Z"), at("2026-03-29T03:00Z")]
    assert changes(hours("02:10-02:50"), "2026-03-28T12:00Z", 1) == [at("2026-03-30T02:10+02:00")]
    assert changes(hours("22:00-02:30"), "2026-03-28T22:00Z", 1) == [at("2026-03-29T01:00Z")], "at 03:00, not 03:30"


def test_an_hour_that_the_clock_shows_twice_is_open_twice() -> None:
    """On 25 October 2026, Berlin's clocks went from 03:00 back to 02:00."""
    twice = [at(f"2026-10-25T{clock}Z") for clock in ("00:15", "00:45", "01:15", "01:45")]
    assert changes(hours("02:15-02:45"), "2026-10-24T12:00Z", 4) == twice
    assert changes(hours("22:00-02:30"), "2026-10-24T22:00Z", 3) == [
        at(f"2026-10-25T{clock}Z") for clock in ("00:30", "01:00", "01:30")
    ]


@pytest.fixture
def berlin_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Europe/Berlin")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("berlin_clock")
def test_without_a_zone_the_machines_own_clock_counts() -> None:
    own, named = hours("22:00-02:30", None), hours("22:00-02:30")
    for start in ("2026-03-28T12:00Z", "2026-10-24T12:00Z", "2026-07-01T00:00Z"):
        assert changes(own, start, 6) == changes(named, start, 6)
    assert own.clock(at("2026-07-01T20:00Z")) == "22:00"
    assert str(own) == "22:00-02:30, this machine's time"
    assert str(named) == "22:00-02:30, Europe/Berlin"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("22-6", r"'22-6' is no window: write START-END .*22:00-06:00"),
        ("", "'' is no window"),
        ("22:00-06:00,", "'' is no window"),
        ("22:00 to 06:00", "'22:00 to 06:00' is no window"),
        ("22:00-6:5", "'22:00-6:5' is no window"),
        ("-22:00-06:00", "is no window"),
        ("٢٢:٠٠-٠٦:٠٠", "is no window"),
        ("25:00-06:00", "25:00 is no time of day"),
        ("22:00-06:60", "06:60 is no time of day"),
        ("22:00-24:01", "24:01 is no time of day"),
        ("22:00-06:00:99", "06:00:99 is no time of day"),
        ("24:00-06:00", "'24:00-06:00' begins at 24:00"),
        ("22:00-22:00", "'22:00-22:00' ends where it begins .*leave --active-hours out"),
        ("7-8,12:00-12:00,99:00-1:00", r"'7-8' is no window; '12:00-12:00' ends .*; 99:00 is no time of day"),
    ],
)
def test_what_is_wrong_with_a_window_is_named(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=rf"--active-hours .*{said}"):
        active_hours(text, None)


@pytest.mark.parametrize(
    ("zone", "said"),
    [
        ("Berlin", "did you mean Europe/Berlin"),
        ("europe/berlin", "did you mean Europe/Berlin"),
        ("New York", "did you mean America/New_York"),
        ("Europe/Berln", "did you mean Europe/Berlin"),
        ("Hell", r"no such time zone"),
        ("Europe", "no such time zone"),  # a folder of the database
        ("CEST", r"abbreviation .*such as Europe/Berlin \(UTC\+0200\)$"),
        ("cest", "such as Europe/Berlin"),
        ("CST", r"America/Chicago \(UTC-0600\) or Asia/Shanghai \(UTC\+0800\) or America/Havana"),
        ("CEDT", "no such time zone; write a name"),  # no guess: EDT is six hours from there
        ("MEST", "no such time zone; write a name"),
        ("UTC+2", "offset is not a time zone"),  # Etc/GMT+2 is two hours behind
        ("GMT+02:00", "offset is not a time zone"),
        ("+2", "offset is not a time zone"),
        ("../../etc/passwd", "no such time zone; write a name such as Europe/Berlin"),
        ("", "no such time zone"),
    ],
)
def test_a_zone_that_there_is_not_is_told_with_the_one_that_was_meant(zone: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"--time-zone {re.escape(zone)}: .*{said}"):
        active_hours("22:00-06:00", zone)


@pytest.mark.parametrize("zone", ["CEST", "Europe/Berln", ":nonsense"])
def test_a_machine_whose_own_zone_is_none_is_found_out(monkeypatch: pytest.MonkeyPatch, zone: str) -> None:
    monkeypatch.setenv("TZ", zone)
    with pytest.raises(UsageError, match=r"environment variable TZ is .* give --time-zone"):
        active_hours("22:00-06:00", None)
    assert active_hours("22:00-06:00", "Europe/Berlin") is not None


@pytest.mark.parametrize("zone", ["Europe/Berlin", ":Europe/Berlin", "CET-1CEST", "UTC", "/etc/localtime", ""])
def test_a_machine_s_own_zone_may_be_written_as_the_system_allows(monkeypatch: pytest.MonkeyPatch, zone: str) -> None:
    monkeypatch.setenv("TZ", zone)
    assert active_hours("22:00-06:00", None) is not None


def test_a_system_without_zones_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(name: str) -> None:
        raise zoneinfo.ZoneInfoNotFoundError(name)

    monkeypatch.setattr(zoneinfo, "ZoneInfo", nowhere)
    monkeypatch.setattr(zoneinfo, "available_timezones", set)
    with pytest.raises(UsageError, match="install the package 'tzdata'"):
        active_hours("22:00-06:00", "Europe/Berlin")


def test_a_zone_without_hours_is_of_no_use() -> None:
    assert active_hours(None, None) is None
    with pytest.raises(UsageError, match=r"--time-zone UTC .*--active-hours"):
        active_hours(None, "UTC")


def test_a_file_says_them_too_and_the_server_is_told_nothing(tmp_path: Path) -> None:
    (tmp_path / "client.toml").write_text('active-hours = "22:00-06:00"\ntime-zone = "Europe/Berlin"\n')
    found = files.load(ClientConfig, tmp_path / "client.toml", {"time_zone": "UTC"})
    assert (found.active_hours, found.time_zone) == ("22:00-06:00", "UTC")
