"""Measures a command as a whole, from the start of its process to its end, `import torch` included."""

import contextlib
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.networks import FIRST_STEP_FILE
from fedshelf.core.errors import FedShelfError
from fedshelf.core.process_exit import describe_exit

SAMPLING_SECONDS = 0.05
MB = 1_000_000
TIMEOUT_SECONDS = 3600.0
KILL_SECONDS = 2.0
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
LOG_TAIL = 300  # characters of a log that an error message repeats


class MeasurementError(FedShelfError):
    """A measured process failed; its output is on standard error or in its log."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A Python program to measure, and the environment it runs in.

    Attributes:
        name: Its name in tables.
        command: The module and its arguments.
        python: The interpreter, which decides the environment of packages.
        environment: Variables in addition to those of this process.
        timeout: Seconds for one run.
        is_peer: Whether the other programs are still measured when it fails.
        log: Where its standard error goes; None is the standard error of this process.
    """

    name: str
    command: Sequence[str]
    python: Path = Path(sys.executable)
    environment: Mapping[str, str] = field(default_factory=dict)
    timeout: float = TIMEOUT_SECONDS
    is_peer: bool = False
    log: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One run of a command, with all processes it started.

    Attributes:
        seconds: Wall clock, from before the process exists until it has ended.
        cpu_seconds: User and system time, without at most the last 50 ms of each process.
        peak_mb: The highest sum of resident sizes (10^6 bytes; pages that processes share count in each).
        processes: The highest number of processes at a time.
        first_step: Seconds until training first enters the network; None where nothing is trained.
        figures: The JSON object that the command printed as its last line.
    """

    seconds: float
    cpu_seconds: float
    peak_mb: float
    processes: int
    first_step: float | None
    figures: Mapping[str, Any]


def median(samples: Sequence[Sample], figure: Callable[[Sample], float]) -> float:
    """Return the median of one figure over all runs."""
    return statistics.median(figure(sample) for sample in samples)


def measure(program: Program) -> Sample:
    """Run a program, measure it, and kill whatever it leaves behind.

    Raises:
        MeasurementError: It failed, or took too long.
    """
    if log := program.log:
        log.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryFile("w+") as output,
        tempfile.TemporaryDirectory() as folder,
        log.open("w", encoding="utf-8") if log else contextlib.nullcontext() as errors,
    ):
        first_step_file = Path(folder) / "first-step"
        variables = {"OMP_WAIT_POLICY": "PASSIVE", FIRST_STEP_FILE: str(first_step_file), **program.environment}
        command = [str(program.python), "-m", *program.command]
        started = time.monotonic()
        with (
            subprocess.Popen(command, env={**os.environ, **variables}, stdout=output, stderr=errors) as process,
            ProcessTree(root=process.pid) as tree,
        ):
            in_time = tree.watch(process, started + program.timeout)
            seconds = time.monotonic() - started
        name = f"python -m {' '.join(program.command)}"
        if process.returncode or not in_time:
            timed_out = f"{name} did not finish in {program.timeout:.0f} s"
            reason = describe_exit(name, process.returncode) if in_time else timed_out
            raise MeasurementError(f"{reason}{_log_tail(log)}")
        lines = first_step_file.read_text().split() if first_step_file.exists() else []
        output.seek(0)
        figures = _last_object(output.read(), name)
    return Sample(
        seconds=seconds, cpu_seconds=sum(tree.cpu_seconds.values()), peak_mb=tree.peak_bytes / MB,
        processes=tree.max_processes, first_step=min(map(float, lines)) - started if lines else None, figures=figures,
    )  # fmt: skip


def _log_tail(log: Path | None) -> str:
    text = " ".join(log.read_text(encoding="utf-8", errors="replace").split()) if log else ""
    return f": …{text[-LOG_TAIL:]} ({log})" if text else ""


def _last_object(output: str, name: str) -> Mapping[str, Any]:
    """The last line that is a JSON object: some programs print more after it."""
    for line in reversed(output.splitlines()):
        with contextlib.suppress(json.JSONDecodeError):
            if isinstance(found := json.loads(line), dict):
                return found
    raise MeasurementError(f"{name} succeeded but printed no figures")


@dataclass(kw_only=True)
class ProcessTree:
    """A process and everything below it, and what they use.

    A process whose parent has ended still belongs to the tree: it was seen before, or (on Linux) it has become a child
    of this process. Processor time is what was read last from each process: some, such as those of a fork server, are
    in no other process' total.

    Attributes:
        root: The id of the first process.
        peak_bytes: The highest sum of resident sizes.
        max_processes: The highest number of processes at a time.
        cpu_seconds: User and system time by process (its id and the time of its start).
        seen: All processes of the tree so far.
        unrelated: Ids of the children of this process that do not belong to the tree.
    """

    root: int
    peak_bytes: int = 0
    max_processes: int = 0
    cpu_seconds: dict[tuple[int, float], float] = field(default_factory=dict)
    seen: dict[int, psutil.Process] = field(default_factory=dict)
    unrelated: set[int] = field(default_factory=set)

    def __enter__(self) -> "ProcessTree":
        _set_subreaper(True)
        self.unrelated = {child.pid for child in psutil.Process().children()} - {self.root}
        self.seen[self.root] = psutil.Process(self.root)
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        _set_subreaper(False)

    def watch(self, process: "subprocess.Popen[bytes]", deadline: float) -> bool:
        """Sample the tree until the process ends; return False if the deadline (`time.monotonic`) passes before."""
        while process.poll() is None:
            if time.monotonic() > deadline:
                return False
            self._sample(self._members())
            time.sleep(SAMPLING_SECONDS)
        return True

    def kill(self) -> None:
        """Kill every process that was seen and is still running."""
        left = [member for member in self.seen.values() if member.is_running()]
        for member in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(left, timeout=KILL_SECONDS)
        for pid in self.seen.keys() - {self.root}:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)  # an orphan that became a child of this process

    def _members(self) -> list[psutil.Process]:
        """The running processes of the tree."""
        running = {pid: member for pid, member in self.seen.items() if member.is_running()}
        for member in psutil.process_iter(["ppid"]):
            parent = member.info["ppid"]
            if parent in running or (parent == os.getpid() and member.pid not in self.unrelated):
                running.setdefault(member.pid, member)
        self.seen |= running
        return list(running.values())

    def _sample(self, members: list[psutil.Process]) -> None:
        sizes = []
        for member in members:
            try:
                with member.oneshot():
                    used = member.cpu_times()
                    sizes.append(member.memory_info().rss)
            except psutil.NoSuchProcess:
                continue  # it has just ended
            self.cpu_seconds[member.pid, member.create_time()] = used.user + used.system
        self.peak_bytes = max(self.peak_bytes, sum(sizes))
        self.max_processes = max(self.max_processes, len(sizes))


def _set_subreaper(on: bool) -> None:
    """Let orphans below this process become its children, where the system can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)
