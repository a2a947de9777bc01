"""What the demo says when one of its processes ends before its time."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedshelf.cli.demo import _wait_for_run
from fedshelf.core.errors import RunError

WAIT = "import time; time.sleep(60)"
CRASH = "import os, resource, signal; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.kill(os.getpid(), signal.{})"


@contextmanager
def running(code: str) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (CRASH.format("SIGSEGV"), r"^the process of lyon was ended by SIGSEGV \(.*\); its log is .*lyon"),
        ("raise SystemExit(1)", "^the process of lyon ended with exit code 1: error: no photos; its log is .*lyon"),
    ],
)  # fmt: skip
def test_a_client_that_ends_early_is_named(tmp_path: Path, code: str, said: str) -> None:
    log = tmp_path / "lyon.log"
    log.write_text("error: no photos\n")
    with running(WAIT) as server, running(code) as client, pytest.raises(RunError, match=said):
        _wait_for_run(server, {log: client}, threading.Event())


def test_a_server_that_crashes_is_named(tmp_path: Path) -> None:
    said = r"^the server's process was ended by SIGBUS .* logs are in .*logs$"
    with running(CRASH.format("SIGBUS")) as server, running(WAIT) as client, pytest.raises(RunError, match=said):
        _wait_for_run(server, {tmp_path / "logs" / "lyon.log": client}, threading.Event())


def test_a_demo_that_is_stopped_has_not_failed_though_its_server_was_stopped_with_it(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with running("raise SystemExit(1)") as server, running(WAIT) as client:
        server.wait()
        _wait_for_run(server, {tmp_path / "lyon.log": client}, stop)
