"""Tells the server how a client's process died, which that process cannot do itself.

A small process (this module, run by itself) reads from a pipe that the client holds open, so it learns of the client's
end however that comes. Where the end is a fault in native code, Python's `faulthandler` has written the signal and the
stack of every thread into the pipe: the reporter passes them on to standard error, and the signal's name to the server.
What leaves the store is that name alone.
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

logger = logging.getLogger(__name__)

REPORT_SECONDS = 3.0  # that the server may take to answer; a report is sent once
TOKEN_HEADER = "fedshelf-crash-token"  # noqa: S105 the name of a header
FATAL = b"Fatal Python error: "
SIGNALS = {
    b"Segmentation fault": "SIGSEGV",
    b"Bus error": "SIGBUS",
    b"Aborted": "SIGABRT",
    b"Illegal instruction": "SIGILL",
    b"Floating point exception": "SIGFPE",
    b"Floating-point exception": "SIGFPE",
}  # faulthandler's words, in all versions of Python


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportTarget:
    """Where to report the death of a registered client.

    Attributes:
        address: the server's, HOST:PORT.
        ca: the certificate authority to trust, as for the client itself.
        insecure: speak in clear.
        token: what this registration gave the server to know the report by.
    """

    address: str
    ca: str | None
    insecure: bool
    token: str


class CrashReporter:
    """The reporter of this process, as a context manager: within it, an end of the process is a crash.

    Where no process can be started (limits, memory), that is logged, and the client works without.

    Args:
        name: what to call the client on standard error.
    """

    def __init__(self, name: str) -> None:
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: IO[bytes] | None = None
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __spec__.name], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path}, bufsize=0,
                start_new_session=True,  # Ctrl-C and a closed terminal are for the client
            )  # fmt: skip
        except OSError as error:
            logger.warning(
                "no crash reporter can be started (%s): the server will not learn of a crash here", reason(error)
            )
            return
        self._pipe = self._process.stdin
        self._tell({"name": name})
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
        self._tell({"closed": True})
        self._pipe.close()
        self._process.wait()

    @contextlib.contextmanager
    def reporting_to(self, target: ReportTarget) -> Iterator[None]:
        """Within it, a crash is reported there."""
        self._tell({"target": asdict(target)})
        try:
            yield
        finally:
            self._tell({"target": None})

    def _tell(self, news: dict[str, object]) -> None:
        if self._pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # somebody killed the reporter; the client works without it
                self._pipe.write(json.dumps(news).encode() + b"\n")


def stand_by(pipe: Iterable[bytes]) -> None:
    """The reporter's life: read what the client tells until its process ends, and report that end if it is a crash."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # service managers send it to both; the client's end is ours
    told: dict[str, Any] = {}
    crash = []
    for line in pipe:
        if line.startswith(b"{"):
            told |= json.loads(line)
        else:
            crash.append(line)
    if "closed" not in told:
        target = told.get("target")
        _report(told.get("name", "client"), b"".join(crash), None if target is None else ReportTarget(**target))


def _report(name: str, crash: bytes, target: ReportTarget | None) -> None:
    by = signal_in(crash)
    os.write(2, crash + f"{name}: {ended_by(f'the process of {name}', by)}\n".encode(errors="backslashreplace"))
    os.close(2)  # whoever reads the client's log need not wait for the network
    if target is None:
        return
    from fedshelf.deploy.address import parse_address
    from fedshelf.deploy.http_connection import HttpConnection
    from fedshelf.deploy.tls import client_context

    context = None if target.insecure else client_context(Path(target.ca) if target.ca else None)
    line = HttpConnection(parse_address(target.address), context, timeout=REPORT_SECONDS)
    content = json.dumps({"token": target.token, "signal": by}).encode()
    line.request("POST", "/fedshelf/died", {"content-type": "application/json"}, content)


def signal_in(crash: bytes) -> str:
    """The name of the signal that `faulthandler` wrote of; empty where it wrote nothing of one."""
    for line in crash.splitlines():
        if line.startswith(FATAL):
            return SIGNALS.get(line.removeprefix(FATAL).strip(), "")
    return ""


if __name__ == "__main__":
    with contextlib.suppress(Exception):  # nobody is left to be told that the server was not
        stand_by(sys.stdin.buffer)
