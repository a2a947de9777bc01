"""Child processes that end with their parent, whether by an exception, a signal or SIGKILL.

The parent holds one end of a pipe open and never writes to it. When the parent ends, the system closes that end, and a
thread in the child that reads the other end wakes up. Unlike Linux's `PR_SET_PDEATHSIG`, this works on every POSIX
system, has no race at startup, and does not depend on which thread of the parent started the child.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO

STOP_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
"""Signals that ask a process to end: Ctrl-C, a service manager, a closing terminal."""

EXIT_CODE = 1
_VARIABLE = "FEDSHELF_ENDS_WITH_STDIN"


def start(
    command: Sequence[str], *, environment: Mapping[str, str], output: IO[bytes] | None = None
) -> "subprocess.Popen[bytes]":
    """Start a program that calls `exit_with_parent` first, and so ends with this process.

    The child gets its own process group: Ctrl-C and a closed terminal reach only this process, which then ends the
    child.

    Args:
        command: the program and its arguments.
        environment: the child's environment.
        output: where stdout and stderr go; by default, those of this process.

    Returns:
        The running process.
    """
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=output, stderr=output, env={**environment, _VARIABLE: "1"},
        process_group=0,
    )  # fmt: skip


def exit_with_parent(*, patience: float = 15.0) -> None:
    """End this process with its parent, if it was started by `start`; otherwise do nothing.

    Args:
        patience: seconds to exit after the SIGTERM that this process sends itself.
    """
    if os.environ.pop(_VARIABLE, None) is not None:  # child processes have another stdin
        end_with(0, patience=patience)


def end_with(descriptor: int, *, patience: float = 0.0) -> None:
    """End this process when the other end of a pipe is closed.

    Args:
        descriptor: the reading end of the pipe. Nothing is ever written to the other end.
        patience: seconds to exit after the SIGTERM that this process sends itself; 0 exits at once.
    """

    def watch() -> None:
        os.read(descriptor, 1)
        if patience:
            # Signal the main thread: Python runs handlers there, and the signal interrupts its blocking calls.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            time.sleep(patience)
        os._exit(EXIT_CODE)

    threading.Thread(target=watch, name="fedshelf-parent", daemon=True).start()


def end_all(processes: Sequence["subprocess.Popen[bytes]"], *, patience: float) -> None:
    """Terminate all processes at once, and kill those that do not exit in time.

    Args:
        processes: running or finished processes.
        patience: seconds to wait before killing.
    """
    deadline = time.monotonic() + patience
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Block `STOP_SIGNALS` in processes started within, from their first instruction; only their parent ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
