"""Child processes that end with their parent, whatever ends it: an exception, a signal, SIGKILL.

The parent holds one end of a pipe open and never writes to it. However the parent ends, the system closes that end, and
a thread of the child that reads the other end wakes up. Unlike Linux's `PR_SET_PDEATHSIG`, this works on every POSIX
system, leaves no moment unguarded, and does not depend on which thread of the parent started the child.
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
"""Signals that ask a process to end: Ctrl-C, a service manager, a terminal that closes."""

EXIT_CODE = 1
_VARIABLE = "FEDSHELF_ENDS_WITH_STDIN"


def start(
    command: Sequence[str], *, environment: Mapping[str, str], output: IO[bytes] | None = None
) -> "subprocess.Popen[bytes]":
    """Start a program that calls `follow_parent` first thing, and so ends with this process.

    It has a process group of its own: Ctrl-C and a closed terminal reach this process alone, which then ends the child.

    Args:
        command: the program and its arguments.
        environment: its environment.
        output: where its output goes; by default, where that of this process goes.
    """
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=output, stderr=output, env={**environment, _VARIABLE: "1"},
        process_group=0,
    )  # fmt: skip


def follow_parent(*, patience: float = 15.0) -> None:
    """In a child made by `start`: end with the parent. In any other process: do nothing.

    Args:
        patience: seconds to end after the SIGTERM that this process then sends itself.
    """
    if os.environ.pop(_VARIABLE, None) is not None:  # not for this process' own children, whose stdin is another
        end_with(0, patience=patience)


def end_with(descriptor: int, *, patience: float = 0.0) -> None:
    """End this process when the other end of a pipe is closed.

    Args:
        descriptor: the reading end; nothing is ever written to the other.
        patience: seconds to end after the SIGTERM that this process then sends itself; 0 ends it at once.
    """

    def watch() -> None:
        os.read(descriptor, 1)
        if patience:
            # To the main thread: Python runs handlers there, and what it waits in is interrupted.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            time.sleep(patience)
        os._exit(EXIT_CODE)

    threading.Thread(target=watch, name="fedshelf-parent", daemon=True).start()


def end_all(processes: Sequence["subprocess.Popen[bytes]"], *, patience: float) -> None:
    """Ask processes to end, all at once, and kill those that do not.

    Args:
        processes: running or not.
        patience: seconds that they have.
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
    """What is started within has `STOP_SIGNALS` blocked from its first instruction: its parent alone ends it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
