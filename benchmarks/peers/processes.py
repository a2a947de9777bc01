"""Starts a peer's own programs, and ends everything that they have started."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fedshelf.core.process_exit import describe_exit

STOP_SECONDS = 15.0


@contextlib.contextmanager
def running(command: Sequence[str], *, environment: Mapping[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """A process in a session of its own, which is killed at the end of the block; its output goes to standard error."""
    process = subprocess.Popen(command, env=environment, stdout=sys.stderr, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what the process has left behind
        process.wait()


def run(command: Sequence[str], *, environment: Mapping[str, str]) -> None:
    """Run a process to its end, with its output on standard error.

    Raises:
        SystemExit: It failed.
    """
    if code := subprocess.run(command, env=environment, stdout=sys.stderr, check=False).returncode:
        raise SystemExit(f"{describe_exit(Path(command[0]).name, code)}; see above")


def program(name: str) -> str:
    """Return the path of a command that belongs to this environment."""
    return str(Path(sys.executable).parent / name)


def free_ports(count: int) -> list[int]:
    """Return free ports of the loopback interface."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def wait_for_port(port: int, process: "subprocess.Popen[bytes]") -> None:
    """Wait until the process listens on the port.

    Raises:
        SystemExit: The process has ended.
    """
    while process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise SystemExit(f"{describe_exit('the server', process.returncode)} before it listened on port {port}; see above")
