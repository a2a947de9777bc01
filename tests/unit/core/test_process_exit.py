"""How processes end, and what is said of it."""

import signal
import subprocess
import sys

import pytest

from fedshelf.core.process_exit import CRASHES, describe_exit, ended_by, signal_of


def exit_code(code: str) -> int:
    """How a real process ends that runs `code`."""
    limit = "import os, resource, signal; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
    return subprocess.run([sys.executable, "-c", limit + code], timeout=60, check=False).returncode


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL", "SIGTERM"])
def test_a_process_that_a_signal_ended_is_named_by_it(name: str) -> None:
    code = exit_code(f"os.kill(os.getpid(), signal.{name})")
    assert signal_of(code) == name
    assert describe_exit("the process of lyon", code).startswith(f"the process of lyon was ended by {name}")


def test_a_real_time_signal_has_a_number() -> None:
    assert signal_of(-(signal.SIGRTMIN + 3)) == f"signal {signal.SIGRTMIN + 3}"


@pytest.mark.parametrize(("code", "said"), [(0, "ended with exit code 0"), (3, "ended with exit code 3")])
def test_a_process_that_ended_by_itself_is_named_by_its_exit_code(code: int, said: str) -> None:
    assert exit_code(f"os._exit({code})") == code
    assert signal_of(code) == ""
    assert describe_exit("it", code) == f"it {said}"


def test_one_that_still_runs_was_ended_by_nothing() -> None:
    assert signal_of(None) == ""


def test_what_a_signal_suggests_is_said() -> None:
    assert ended_by("it", "SIGKILL") == "it was ended by SIGKILL (out of memory?)"
    assert ended_by("it", "SIGTERM") == "it was ended by SIGTERM"
    assert ended_by("it", "") == "it ended without a message (killed, or out of memory?)"
    assert {ended_by("it", name) for name in CRASHES} == {
        f"it was ended by {name} (a fault in native code)" for name in CRASHES
    }
