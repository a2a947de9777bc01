"""Ends every process that a benchmark has started, whatever ends the benchmark itself.

`python -m benchmarks.processes ID` is the watchdog that `ending_all_children` starts: it waits on a pipe that closes
when the benchmark's process is gone (after its normal end, a signal, a crash or `kill -9`), and then kills every
process that carries the benchmark's id in its environment.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import psutil

ID_VARIABLE = "FEDSHELF_BENCHMARK_ID"
MAX_SCANS = 20  # a process may fork while the others are being killed


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
    for _ in range(MAX_SCANS):
        found = [process for process in psutil.process_iter() if _id_of(process) == benchmark_id]
        if not found:
            return
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=1)


def _id_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(ID_VARIABLE)
    except (psutil.Error, OSError):  # it belongs to another user, or has just ended
        return None


if __name__ == "__main__":
    sys.stdin.buffer.read()  # returns when the benchmark's process is gone
    kill_all(sys.argv[1])
