"""Starts a peer's own programs, and ends all that they have started."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PATIENCE_SECONDS = 15.0


@contextlib.contextmanager
def running(command: Sequence[str], *, environment: Mapping[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """A process in a session of its own, with its output on our standard error; at the end the session is ended."""
    process = subprocess.Popen(command, env=environment, stdout=sys.stderr, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has started and left
        process.wait()


def program(name: str) -> str:
    """The path of a command that came with this environment."""
    return str(Path(sys.executable).parent / name)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def wait_for_port(port: int, process: "subprocess.Popen[bytes]") -> None:
    """Until somebody listens.

    Raises:
        SystemExit: the process that should has ended.
    """
    while process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise SystemExit(f"a server ended with code {process.returncode} before it listened on port {port}; see above")
