"""Starts and stops worker processes.

Workers are forked where that is safe: they then share everything this process has imported and loaded, without startup
time and with little memory. torch's data loading starts its workers in the same way, under the same condition: a worker
must not compute with several threads or on a device, because neither survives a fork. Otherwise workers are spawned.

Workers ignore the signals that ask a process to stop. Ctrl-C and service managers send these to all processes at once,
and the parent would treat a worker that ends first as failed.
"""

import contextlib
import faulthandler
import gc
import logging
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import psutil
import torch

from fedshelf.core import child_process
from fedshelf.core.choices import DeviceName
from fedshelf.tracking.terminal import log_to_stderr

PATIENCE = 2.0  # seconds for workers to exit by themselves
LARGEST_OOM_SCORE = 1000  # man 5 proc: such a process is killed first
THREADED = frozenset(("polars", "tenseal"))
"""Libraries whose threads do not survive a fork."""

Method = Literal["fork", "spawn"]
Target = Callable[[Connection, int], None]
"""A worker's main function: receives its end of the pipe and its number, and runs until the pipe closes."""


def start_method(device: DeviceName, *, threads: int) -> Method:
    """Choose how to start workers.

    Args:
        device: the device they compute on.
        threads: threads per worker.

    Returns:
        "fork" where that is safe, else "spawn".
    """
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    has_threads = not THREADED.isdisjoint(sys.modules)
    return "fork" if sys.platform == "linux" and threads == 1 and on_cpu and not has_threads else "spawn"


class Processes:
    """Worker processes and the parent's ends of their pipes.

    Args:
        target: the workers' main function; picklable if `method` is "spawn".
        count: number of processes.
        method: how to start them.
    """

    def __init__(self, target: Target, count: int, method: Method) -> None:
        self.connections: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._target = target
        try:
            for number in range(count):
                self.connections.append(self._start(number, method))
        except BaseException:
            self.close()
            raise

    def _start(self, number: int, method: Method) -> Connection:
        with child_process.stop_signals_blocked():
            if method == "spawn":
                resource_tracker.ensure_running()  # unblocks signals, so they are blocked again
            with child_process.stop_signals_blocked():
                return self._start_blocked(number, method)

    def _start_blocked(self, number: int, method: Method) -> Connection:
        context = multiprocessing.get_context(method)
        parent_end, child_end = context.Pipe()
        # A forked child inherits the ends created so far and must not keep the other workers' pipes open.
        others = (*self.connections, parent_end) if method == "fork" else ()
        process = context.Process(target=_live, args=(self._target, child_end, number, others), daemon=True)  # type: ignore[attr-defined]
        with warnings.catch_warnings():  # since Python 3.12: "this process is multi-threaded"; see above
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        child_end.close()
        self._processes.append(process)
        return parent_end

    def activity(self, number: int) -> float:
        """Return a number that changes while a worker computes or is stopped by a signal: its seconds of CPU time.

        That of one that has ended does not change, in case its pipe does not say so.
        """
        try:
            process = psutil.Process(self._processes[number].pid)
            if process.status() in {psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP}:
                return time.monotonic()
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return times.user + times.system

    def replace(self, number: int) -> Connection:
        """Kill a worker, which prints what it is waiting for, and start another one in its place.

        The new one is not forked: by now, this process may have threads that hold locks.

        Returns:
            The new connection; the worker's number for `target` is one that no other worker has had.
        """
        hung = self._processes[number]
        if hasattr(signal, "SIGUSR1") and hung.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(hung.pid, signal.SIGUSR1)
                time.sleep(PATIENCE / 4)
        hung.kill()
        hung.join()
        self.connections[number].close()
        self.connections[number] = self._start(len(self._processes), "spawn")
        self._processes[number], self._processes[-1] = self._processes[-1], hung
        return self.connections[number]

    def exit_code(self, number: int) -> int:
        """Return the exit code of a worker whose pipe has closed, which may be slightly before the process ends."""
        process = self._processes[number]
        process.join(PATIENCE)
        return process.exitcode or 0

    def close(self) -> None:
        """Stop the workers by closing their pipes; kill those that do not exit in time."""
        deadline = time.monotonic() + PATIENCE
        try:
            for connection in self.connections:
                connection.close()
            for process in self._processes:
                process.join(timeout=max(0.0, deadline - time.monotonic()))
        finally:  # also on a second Ctrl-C
            for process in self._processes:
                process.kill()
                process.join()


def _prefer_for_oom_kill() -> None:
    """Make Linux's out-of-memory killer choose this process before its parent, which can report what happened."""
    with contextlib.suppress(OSError):
        score = Path("/proc/self/oom_score_adj")
        score.write_text(str(min(LARGEST_OOM_SCORE, int(score.read_text()) + LARGEST_OOM_SCORE // 2)))


def _live(target: Target, connection: Connection, number: int, others: Sequence[Connection]) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        child_process.end_with(parent.sentinel)  # also during a task
    _prefer_for_oom_kill()
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1)
    log_to_stderr(logging.WARNING)
    for other in others:
        other.close()
    torch.set_num_threads(1)  # until a setup sets it: the parent's threads do not exist here
    gc.freeze()  # objects inherited from the parent: traversing them would copy their pages
    target(connection, number)
