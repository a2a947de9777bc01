"""Whatever ends a benchmark, its processes end, too."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.unit.benchmarks.test_measure import is_gone

TIMEOUT_SECONDS = 120  # on a busy machine


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[tuple["subprocess.Popen[str]", list[int]]]:
    """A benchmark, and the ids of its child and grandchild."""
    command = [sys.executable, "-m", "tests.unit.benchmarks.start_children", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, [int(pid) for pid in process.stdout.readline().split()]
        finally:
            process.kill()


def running(*pids: int) -> list[int]:
    """The processes that still run after a while."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while (left := [pid for pid in pids if not is_gone(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@pytest.mark.parametrize(
    ("ending", "code"),
    [(signal.SIGKILL, -9), (signal.SIGSEGV, -11), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)],
)
def test_children_end_with_a_benchmark_that_a_signal_ends(ending: signal.Signals, code: int) -> None:
    with started() as (process, children):
        process.send_signal(ending)
        assert process.wait(TIMEOUT_SECONDS) == code
        assert len(children) == 2
        assert running(*children) == []


def test_children_end_with_a_benchmark_that_ends_by_itself() -> None:
    with started("end") as (process, children):
        assert process.wait(TIMEOUT_SECONDS) == 0
        assert len(children) == 2
        assert running(*children) == []
