"""What a crash reporter makes of what Python writes as it dies."""

import faulthandler
import subprocess
import sys

import pytest

from fedshelf.core.process_exit import CRASHES
from fedshelf.deploy.crash_reporter import SIGNALS, CrashReporter, ReportTarget, signal_in

CRASH = """
import faulthandler, os, resource, signal
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
faulthandler.enable()
os.kill(os.getpid(), signal.{name})
"""


@pytest.mark.parametrize("name", sorted(CRASHES))
def test_every_signal_for_a_crash_is_read_from_pythons_own_words(name: str) -> None:
    crashed = subprocess.run(
        [sys.executable, "-c", CRASH.format(name=name)], capture_output=True, timeout=60, check=False
    )
    assert crashed.returncode < 0
    assert signal_in(crashed.stderr) == name
    assert name in SIGNALS.values()


@pytest.mark.parametrize("words", [b"", b"Traceback\n", b"Fatal Python error: deallocating None\n"])
def test_other_words_name_no_signal(words: bytes) -> None:
    assert signal_in(words) == ""


def test_a_client_works_on_where_no_reporter_can_be_started(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    enabled = faulthandler.is_enabled()
    target = ReportTarget(address="127.0.0.1:1", ca=None, insecure=True, token="")
    with CrashReporter("lyon") as reporter, reporter.reporting_to(target):
        assert "no crash reporter can be started" in caplog.text
    assert faulthandler.is_enabled() == enabled


def test_a_reporter_needs_nothing_large_to_report() -> None:
    code = (
        "import sys, fedshelf.deploy.crash_reporter, fedshelf.deploy.http_connection, fedshelf.deploy.tls\n"
        "print([name for name in ('torch', 'numpy', 'flwr') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "[]"
