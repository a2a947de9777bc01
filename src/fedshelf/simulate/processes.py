"""Worker processes: how they are started, and how they end.

Where it is safe, they are forked: then they have what this process has imported and loaded, at no cost in time and
little in memory. That is how torch's own data loading starts its workers, under the same condition: a worker may not
compute with several threads, and not on a device, because neither survives the fork. Else they are started afresh.

Workers do not take the signals that ask a process to stop. Ctrl-C and service managers send these to all processes at
once, and a worker that ended first would be a failure to its parent.
"""

import contextlib
import gc
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import torch

from fedshelf.core import child_process
from fedshelf.core.choices import DeviceName

PATIENCE = 2.0  # seconds for workers to end by themselves
LARGEST_OOM_SCORE = 1000  # man 5 proc: such a process is killed before all others

Method = Literal["fork", "spawn"]
Target = Callable[[Connection, int], None]
"""What a worker does with its end of the pipe and its number, until the pipe ends."""


def start_method(device: DeviceName, *, threads: int) -> Method:
    """How to start workers that compute on `device` with so many threads."""
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    return "fork" if sys.platform == "linux" and threads == 1 and on_cpu else "spawn"


class Processes:
    """`count` processes that each do `target`, and our ends of their pipes.

    Args:
        target: picklable where `method` is spawn.
    """

    def __init__(self, target: Target, count: int, method: Method) -> None:
        self.connections: list[Connection] = []
        self._processes: list[BaseProcess] = []
        try:
            with child_process.stop_signals_blocked():
                if method == "spawn":
                    resource_tracker.ensure_running()  # unblocks signals here, so all are blocked again
                with child_process.stop_signals_blocked():
                    for number in range(count):
                        self._start(target, number, method)
        except BaseException:
            self.close()
            raise

    def _start(self, target: Target, number: int, method: Method) -> None:
        context = multiprocessing.get_context(method)
        ours, theirs = context.Pipe()
        self.connections.append(ours)
        # A forked child has copies of all ends made so far, and must not keep the others' pipes open.
        others = tuple(self.connections) if method == "fork" else ()
        process = context.Process(target=_live, args=(target, theirs, number, others), daemon=True)  # type: ignore[attr-defined]
        with warnings.catch_warnings():  # from Python 3.12 on: "this process is multi-threaded"; see above
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        theirs.close()
        self._processes.append(process)

    def exit_code(self, number: int) -> int:
        """How a worker ended whose pipe has ended: a killed one's pipe does so a moment before it."""
        process = self._processes[number]
        process.join(PATIENCE)
        return process.exitcode or 0

    def close(self) -> None:
        """End them: a worker reads the end of its pipe. One that does not in time is killed."""
        deadline = time.monotonic() + PATIENCE
        try:
            for connection in self.connections:
                connection.close()
            for process in self._processes:
                process.join(timeout=max(0.0, deadline - time.monotonic()))
        finally:  # also where somebody is impatient
            for process in self._processes:
                process.kill()
                process.join()


def _die_first() -> None:
    """Where memory runs out, have Linux kill this process rather than its parent, which can say what happened."""
    with contextlib.suppress(OSError):
        score = Path("/proc/self/oom_score_adj")
        score.write_text(str(min(LARGEST_OOM_SCORE, int(score.read_text()) + LARGEST_OOM_SCORE // 2)))


def _live(target: Target, connection: Connection, number: int, others: Sequence[Connection]) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        child_process.end_with(parent.sentinel)  # in the midst of a task, too
    _die_first()
    for other in others:
        other.close()
    torch.set_num_threads(1)  # until a setup says otherwise: the parent's threads are not here
    gc.freeze()  # what came with the fork is not ours to collect: looking at it would copy its pages
    target(connection, number)
