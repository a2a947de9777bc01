"""Starts processes, names how they ended, and ends all of them with the benchmark, whatever ends that.

`python -m benchmarks.processes ID` is the watchdog that `ending_all_children` starts: it waits on a pipe that closes
when the benchmark's process is gone (after its normal end, a signal, a crash or `kill -9`), and then kills every
process that carries the benchmark's id in its environment.

Peers' programs import this module in their environments: it needs the standard library only, and the watchdog psutil.
"""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

from fedshelf.core.process_exit import describe_exit

ID_VARIABLE = "FEDSHELF_BENCHMARK_ID"
MAX_SCANS = 20  # a process may fork while the others are being killed
STOP_SECONDS = 15.0


@contextlib.contextmanager
def ending_all_children() -> Iterator[None]:
    """End all processes below this one when the block ends, and when this process dies before that.

    SIGINT, SIGTERM and SIGHUP leave the block by SystemExit, so that temporary folders are removed first.
    """
    benchmark_id = secrets.token_hex(8)
    command = [sys.executable, "-m", "benchmarks.processes", benchmark_id]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
        os.environ[ID_VARIABLE] = benchmark_id
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
                signal.signal(number, _exit)
        yield


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def kill_all(benchmark_id: str) -> None:
    """Kill every process whose environment carries the id."""
    import psutil

    def has_id(process: psutil.Process) -> bool:
        try:
            return process.environ().get(ID_VARIABLE) == benchmark_id
        except (psutil.Error, OSError):  # it belongs to another user, or has just ended
            return False

    for _ in range(MAX_SCANS):
        found = [process for process in psutil.process_iter() if has_id(process)]
        if not found:
            return
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=1)


@contextlib.contextmanager
def running(
    command: Sequence[str], *, environment: Mapping[str, str], stdout: int | IO[bytes] | None = None,
    stderr: IO[bytes] | None = None,
) -> Iterator["subprocess.Popen[bytes]"]:  # fmt: skip
    """A process in a session of its own, which is stopped at the end of the block, with all that it has left behind.

    Args:
        command: The program and its arguments.
        environment: Its environment.
        stdout: Where its standard output goes; None is standard error.
        stderr: Where its standard error goes; None is that of this process.
    """
    process = subprocess.Popen(
        command, env=environment, stdout=stdout or sys.stderr, stderr=stderr, start_new_session=True
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(command: Sequence[str], *, environment: Mapping[str, str]) -> None:
    """Run a process to its end, with its output on standard error.

    Raises:
        SystemExit: It failed.
    """
    with running(command, environment=environment) as process:
        if code := process.wait():
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


if __name__ == "__main__":
    sys.stdin.buffer.read()  # returns when the benchmark's process is gone
    kill_all(sys.argv[1])
