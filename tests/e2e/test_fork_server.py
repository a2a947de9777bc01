"""Processes from the fork server of the tests are what fresh ones are."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests import fork_server
from tests.e2e import told_to_end
from tests.fork_server import ForkedProcess, environment_of_a_process
from tests.processes import Site

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(
    ("ending", "by"),
    [
        ("0", None),
        ("3", None),
        ("a reason", None),
        ("raises", None),
        ("waits", signal.SIGTERM),
        ("waits", signal.SIGINT),
        ("waits", signal.SIGKILL),
    ],
)
def test_a_forked_process_finds_and_does_what_a_fresh_one_does(
    ending: str, by: signal.Signals | None, tmp_path: Path
) -> None:
    environment = {**environment_of_a_process(), "FEDSHELF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", told_to_end.__name__, ending, "another argument"]
    ends = []
    for fresh in (True, False):
        process = fork_server.start(command, environment=environment, cwd=tmp_path, fresh=fresh)
        assert isinstance(process, ForkedProcess) is not fresh
        assert process.stdout is not None
        assert process.stderr is not None
        with process.stdout, process.stderr:
            found = json.loads(process.stdout.readline())
            if by is not None:
                assert process.poll() is None
                process.send_signal(by)
            code = process.wait(60)
            errors = process.stderr.read().splitlines()
            ends.append((found, code, process.stdout.read(), errors[:1], errors[-1:]))
    assert ends[0] == ends[1]


def test_another_environment_needs_a_fresh_process(tmp_path: Path) -> None:
    environment = {**environment_of_a_process(), "TZ": "Asia/Tokyo"}
    command = [sys.executable, "-m", told_to_end.__name__, "0"]
    process = fork_server.start(command, environment=environment, cwd=tmp_path)
    assert not isinstance(process, ForkedProcess)
    assert process.communicate(timeout=60)[1] == b"to standard error\n"
    assert process.returncode == 0


def test_what_tests_start_is_forked_unless_all_is_to_be_fresh(pair: Site, pytestconfig: pytest.Config) -> None:
    server = pair.server("--rounds", "1")
    command = Path(f"/proc/{server.pid}/cmdline").read_text().split("\0")
    assert (fork_server.__name__ in command) is not pytestconfig.getoption("long")
    server.wait_for_text("listening on")
    assert os.getsid(server.pid) == os.getsid(0)
