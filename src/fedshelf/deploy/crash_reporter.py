"""Reports to the server how a client's process died, which that process cannot do itself.

A small child process runs this module and reads from a pipe that the client holds open, so it notices the client's end
in any case. If the client crashes in native code, Python's `faulthandler` writes the signal and the stack of every
thread to the pipe. The reporter copies them to standard error and sends only the signal's name to the server.
"""

import contextlib
import faulthandler
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from fedshelf.core.process_exit import ended_by
from fedshelf.core.system_errors import reason
from fedshelf.core.text import printable

logger = logging.getLogger(__name__)

REPORT_SECONDS = 3.0  # maximum wait for the server; a report is sent once
TOKEN_HEADER = "fedshelf-crash-token"  # noqa: S105 the name of a header
FATAL = b"Fatal Python error: "
SIGNALS = {
    b"Segmentation fault": "SIGSEGV",
    b"Bus error": "SIGBUS",
    b"Aborted": "SIGABRT",
    b"Illegal instruction": "SIGILL",
    b"Floating point exception": "SIGFPE",
    b"Floating-point exception": "SIGFPE",
}  # faulthandler's messages, in all versions of Python


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportTarget:
    """Where to report the crash of a registered client.

    Attributes:
        address: the server's HOST:PORT.
        ca: the certificate authority to trust, as for the client itself.
        insecure: disable TLS.
        token: authenticates the report for this registration.
        ledger: folder of the store's ledger, which gets a line for the report; None keeps no ledger.
        chain: the chain's key, for the ledger.
    """

    address: str
    ca: str | None
    insecure: bool
    token: str
    ledger: str | None = None
    chain: str = ""


class CrashReporter:
    """This process's crash reporter, as a context manager: a process that ends inside it has crashed.

    If the child process cannot be started, this is logged and the client works without it.

    Args:
        name: the client's name on standard error.
    """

    def __init__(self, name: str) -> None:
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: IO[bytes] | None = None
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __spec__.name], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path}, bufsize=0,
                start_new_session=True,  # Ctrl-C and a closed terminal go to the client only
            )  # fmt: skip
        except OSError as error:
            logger.warning(
                "no crash reporter can be started (%s): the server will not learn of a crash here", reason(error)
            )
            return
        self._pipe = self._process.stdin
        self._send({"name": name})
        if self._pipe is not None:
            faulthandler.enable(self._pipe)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None or self._pipe is None:
            return
        faulthandler.disable()
        self._send({"closed": True})
        self._pipe.close()
        self._process.wait()

    @contextlib.contextmanager
    def reporting_to(self, target: ReportTarget) -> Iterator[None]:
        """Within this context, report a crash to `target`."""
        self._send({"target": asdict(target)})
        try:
            yield
        finally:
            self._send({"target": None})

    def _send(self, fields: dict[str, object]) -> None:
        if self._pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # the reporter was killed; the client works without it
                self._pipe.write(json.dumps(fields).encode() + b"\n")


def run_reporter(pipe: Iterable[bytes]) -> None:
    """Run the reporter: read from the client until its process ends, and report a crash.

    Args:
        pipe: lines from the client.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # service managers send it to both processes; the client handles it
    state: dict[str, Any] = {}
    crash = []
    for line in pipe:
        if line.startswith(b"{"):
            state |= json.loads(line)
        else:
            crash.append(line)
    if "closed" not in state:
        target = state.get("target")
        _report(state.get("name", "client"), b"".join(crash), None if target is None else ReportTarget(**target))


def _report(name: str, crash: bytes, target: ReportTarget | None) -> None:
    by = signal_in(crash)
    ended = printable(f"{name}: {ended_by(f'the process of {name}', by)}")
    os.write(2, crash + f"{ended}\n".encode(errors="backslashreplace"))
    os.close(2)  # readers of the client's log do not wait for the network
    if target is None:
        return
    from fedshelf.deploy.address import parse_address
    from fedshelf.deploy.http_connection import HttpConnection
    from fedshelf.deploy.tls import client_context
    from fedshelf.privacy.ledger import Ledger
    from fedshelf.privacy.ledger_content import Recipient

    context = None if target.insecure else client_context(Path(target.ca) if target.ca else None)
    line = HttpConnection(parse_address(target.address), context, timeout=REPORT_SECONDS)
    content = json.dumps({"token": target.token, "signal": by}).encode()
    ledger = None if target.ledger is None else Ledger(Path(target.ledger))
    release = ledger and ledger.intend_crash_report(content, Recipient(server=target.address, chain=target.chain))
    answer = line.request("POST", "/fedshelf/died", {"content-type": "application/json"}, content)
    if ledger and release and answer.status == 200:
        ledger.confirm(release)


def signal_in(crash: bytes) -> str:
    """Return the name of the signal in `faulthandler`'s output; empty if there is none."""
    for line in crash.splitlines():
        if line.startswith(FATAL):
            return SIGNALS.get(line.removeprefix(FATAL).strip(), "")
    return ""


if __name__ == "__main__":
    with contextlib.suppress(Exception):  # a failed report cannot be reported to anyone
        run_reporter(sys.stdin.buffer)
