"""Processes that end with their parent, whatever ends that."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from fedshelf.core import child_process

PATIENCE = 60.0  # seconds for what must happen, on a busy machine

CHILD = """
import signal, sys, time
from fedshelf.core.child_process import exit_with_parent
if sys.argv[1] == "tidy":
    signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[2], "w").close(), sys.exit()))
elif sys.argv[1] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
exit_with_parent(patience=0.2 if sys.argv[1] == "stubborn" else 60.0)
print("ready", flush=True)
time.sleep(600)
"""
PARENT = """
import os, sys
from fedshelf.core.child_process import start
child = start([sys.executable, "-c", *sys.argv[1:]], environment=os.environ)
print(child.pid, flush=True)
sys.stdin.read()
raise RuntimeError("on purpose")
"""


@contextmanager
def family(kind: str, mark: Path = Path()) -> Iterator[tuple["subprocess.Popen[str]", psutil.Process]]:
    """A process that has started a child, and the child, which is watching."""
    command = [sys.executable, "-c", PARENT, CHILD, kind, str(mark)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        try:
            assert parent.stdout.readline() == "ready\n"
            yield parent, child
        finally:
            parent.kill()
            if child.is_running():
                child.kill()


def assert_ends(process: psutil.Process) -> None:
    """It is gone; where nobody collects orphans, dead is enough."""
    deadline = time.monotonic() + PATIENCE
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGSEGV])
def test_a_child_ends_with_its_parent_whatever_signal_ends_that(by: signal.Signals) -> None:
    with family("plain") as (parent, child):
        parent.send_signal(by)
        assert_ends(child)


def test_a_child_ends_with_a_parent_that_fails() -> None:
    with family("plain") as (parent, child):
        assert parent.stdin is not None
        parent.stdin.close()
        assert_ends(child)


def test_a_child_has_time_to_end_in_good_order(tmp_path: Path) -> None:
    with family("tidy", tmp_path / "mark") as (parent, child):
        parent.kill()
        assert_ends(child)
    assert (tmp_path / "mark").exists()


def test_a_child_that_does_not_end_in_that_time_is_ended() -> None:
    with family("stubborn") as (parent, child):
        parent.kill()
        assert_ends(child)


def test_a_process_that_nobody_started_this_way_follows_nobody() -> None:
    code = "import time; from fedshelf.core.child_process import exit_with_parent as follow; follow(patience=.1); "
    code += "time.sleep(.5)"
    assert subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, check=False).returncode == 0


def test_a_child_s_own_children_follow_nobody() -> None:
    code = (
        "import subprocess, sys\nfrom fedshelf.core.child_process import exit_with_parent\nexit_with_parent()\n"
        "follow = 'from fedshelf.core.child_process import exit_with_parent as f; import time; f(); time.sleep(.5)'\n"
        "sys.exit(subprocess.run([sys.executable, '-c', follow], stdin=subprocess.DEVNULL).returncode)"
    )
    child = child_process.start([sys.executable, "-c", code], environment=os.environ)
    try:
        assert child.wait(PATIENCE) == 0
    finally:
        child_process.end_all([child], patience=PATIENCE)


def test_ctrl_c_at_a_terminal_does_not_reach_a_child() -> None:
    child = child_process.start([sys.executable, "-c", "import time; time.sleep(600)"], environment=os.environ)
    try:
        assert os.getpgid(child.pid) not in (0, os.getpgid(0))
    finally:
        child_process.end_all([child], patience=PATIENCE)


def test_processes_are_asked_to_end_and_then_made_to() -> None:
    ends = "print('ready', flush=True)"
    waits = f"{ends}; import time; time.sleep(600)"
    ignores = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {waits}"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for code in (ignores, waits, ends)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    processes[2].wait(PATIENCE)
    child_process.end_all(processes, patience=1.0)
    assert [process.returncode for process in processes] == [-signal.SIGKILL, -signal.SIGTERM, 0]
    for process in processes:
        assert process.stdout is not None
        process.stdout.close()
