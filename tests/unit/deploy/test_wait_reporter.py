"""A client that waits says what for, since when, and what to do; and does not fill a log with it."""

import threading
from dataclasses import dataclass, field

from fedshelf.deploy.waiting import WaitReporter


@dataclass
class Bench:
    """A reporter whose clock is the test's."""

    now: float = 0.0
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reporter = WaitReporter(self.said.append, clock=lambda: self.now)

    def pass_time(self, seconds: float, *, step: float = 0.5) -> list[str]:
        """What is said meanwhile."""
        before, end = len(self.said), self.now + seconds
        while self.now < end:
            self.now += step
            self.reporter.look()
        return self.said[before:]


def test_a_short_wait_needs_no_word() -> None:
    bench = Bench()
    bench.reporter.begin("the server at 10.0.0.1:8080")
    assert bench.pass_time(9.5) == []
    bench.reporter.end()
    assert bench.pass_time(1000) == []


def test_a_wait_is_told_after_ten_seconds_with_its_cause_and_what_to_do() -> None:
    bench = Bench()
    bench.reporter.begin("the server at 10.0.0.1:8080", "connection refused; check that it runs")
    (said,) = bench.pass_time(10)
    assert said.startswith("waiting for the server at 10.0.0.1:8080 (10 s so far, since 2")
    assert said.endswith("): connection refused; check that it runs")


def test_intervals_grow_until_a_line_an_hour() -> None:
    bench = Bench()
    bench.reporter.begin("work")
    assert [len(bench.pass_time(seconds)) for seconds in (10, 10, 20, 40, 80)] == [1, 1, 1, 1, 1]
    day = bench.pass_time(86_400, step=10)
    assert 24 <= len(day) <= 32
    assert len(bench.pass_time(86_400, step=10)) == 24


def test_the_same_wait_goes_on_when_its_cause_changes_and_another_begins_anew() -> None:
    bench = Bench()
    bench.reporter.begin("the server", "connection refused")
    bench.pass_time(15)
    bench.reporter.begin("the server", "timed out")
    bench.reporter.begin("the server")
    (said,) = bench.pass_time(5)
    assert "(20 s so far, " in said
    assert said.endswith(": timed out")
    bench.reporter.begin("work")
    assert bench.pass_time(9.5) == []
    assert "waiting for work (10 s so far, " in bench.pass_time(0.5)[0]


def test_a_wait_that_comes_again_and_again_is_told_ever_less_often() -> None:
    bench, lines = Bench(), 0
    for _ in range(24 * 60):  # a server that ends each connection after a minute, for a day
        bench.reporter.begin("the server")
        lines += len(bench.pass_time(55, step=5))
        bench.reporter.begin("work")
        lines += len(bench.pass_time(5, step=5))
        bench.reporter.end()
    assert lines < 40


def test_after_a_long_quiet_time_a_wait_is_told_at_once_again() -> None:
    bench = Bench()
    bench.reporter.begin("the server")
    bench.pass_time(3600, step=5)
    bench.reporter.end()
    bench.pass_time(4 * 3600, step=60)
    bench.reporter.begin("the server")
    assert [len(bench.pass_time(seconds)) for seconds in (10, 10, 20)] == [1, 1, 1]


def test_a_thread_speaks_while_the_client_is_blocked() -> None:
    spoken = threading.Event()
    with WaitReporter(lambda text: spoken.set(), first=0.0) as reporter:
        reporter.begin("the server")
        assert spoken.wait(30)
