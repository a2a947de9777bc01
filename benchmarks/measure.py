"""Runs a command as a fresh process and measures all of it: process start and `import torch` included."""

import contextlib
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from benchmarks.networks import FIRST_STEP_FILE
from fedshelf.core.process_exit import describe_exit

SAMPLING_SECONDS = 0.05
MB = 1_000_000
PATIENCE_SECONDS = 3600.0
ENDING_SECONDS = 2.0
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
LAST_WORDS = 300  # characters of a log that an error repeats


class MeasurementError(Exception):
    """A measured process failed; its own words are on the standard error, or in its log."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One run of a command, with all processes it started.

    Attributes:
        seconds: wall clock, from before the process exists to after it has ended.
        cpu_seconds: user and system time, short of the last 50 ms of each process at most.
        peak_mb: highest sum of resident sizes seen (10^6 bytes; pages that processes share count in each).
        processes: most processes seen at a time.
        first_step: seconds until training first entered the network; None where nothing is trained.
        figures: what the command printed as its last line, a JSON object.
    """

    seconds: float
    cpu_seconds: float
    peak_mb: float
    processes: int
    first_step: float | None
    figures: Mapping[str, Any]


def median(samples: Sequence[Sample], figure: Callable[[Sample], float]) -> float:
    """The median of one figure of all runs."""
    return statistics.median(figure(sample) for sample in samples)


def measure(
    command: Sequence[str], *, python: Path = Path(sys.executable), environment: Mapping[str, str] | None = None,
    patience: float = PATIENCE_SECONDS, log: Path | None = None,
) -> Sample:  # fmt: skip
    """Run `python -m <command>`, measure it, and end whatever it leaves behind.

    Args:
        command: the module and its arguments.
        python: the interpreter, and so the environment.
        environment: variables on top of ours.
        patience: seconds after which it has failed.
        log: where its standard error goes; None is ours.

    Raises:
        MeasurementError: the command failed, or took too long.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryDirectory() as folder, _written(log) as errors:
        first_step_file = Path(folder) / "first-step"
        variables = {"OMP_WAIT_POLICY": "PASSIVE", FIRST_STEP_FILE: str(first_step_file), **(environment or {})}
        started = time.monotonic()
        with (
            subprocess.Popen(
                [str(python), "-m", *command], env={**os.environ, **variables}, stdout=output, stderr=errors
            ) as process,
            Watch(root=process.pid) as watch,
        ):  # fmt: skip
            in_time = watch.until_end(process, started + patience)
            seconds = time.monotonic() - started
        if process.returncode or not in_time:
            name = f"python -m {' '.join(command)}"
            what = describe_exit(name, process.returncode) if in_time else f"{name} was not done in {patience:.0f} s"
            raise MeasurementError(f"{what}{_last_words(log)}")
        lines = first_step_file.read_text().split() if first_step_file.exists() else []
        output.seek(0)
        figures = _last_object(output.read(), command)
    return Sample(
        seconds=seconds, cpu_seconds=sum(watch.cpu_seconds.values()), peak_mb=watch.peak_bytes / MB,
        processes=watch.processes, first_step=min(map(float, lines)) - started if lines else None, figures=figures,
    )  # fmt: skip


@contextlib.contextmanager
def _written(log: Path | None) -> Iterator[IO[str] | None]:
    if log is None:
        yield None
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as file:
            yield file


def _last_words(log: Path | None) -> str:
    words = log.read_text(encoding="utf-8", errors="replace").split() if log else []
    return f": …{' '.join(words)[-LAST_WORDS:]} ({log})" if words else ""


def _last_object(output: str, command: Sequence[str]) -> Mapping[str, Any]:
    """The last line that is a JSON object: some programs cannot be kept from talking after it."""
    for line in reversed(output.splitlines()):
        with contextlib.suppress(json.JSONDecodeError):
            if isinstance(found := json.loads(line), dict):
                return found
    raise MeasurementError(f"python -m {' '.join(command)} ended well and printed no figures")


@dataclass(kw_only=True)
class Watch:
    """What a tree of processes uses.

    A process whose parent has ended still belongs to it: it was seen before, or (on Linux) has become our child. CPU
    time is what was seen at the last look at each: a process that is not its parent's to wait for (a fork server's,
    say) is in no other count.
    """

    root: int
    peak_bytes: int = 0
    processes: int = 0
    cpu_seconds: dict[tuple[int, float], float] = field(default_factory=dict)
    seen: dict[int, psutil.Process] = field(default_factory=dict)
    strangers: set[int] = field(default_factory=set)

    def __enter__(self) -> "Watch":
        _adopt_orphans(True)
        self.strangers = {child.pid for child in psutil.Process().children()} - {self.root}
        self.seen[self.root] = psutil.Process(self.root)
        return self

    def __exit__(self, *error: object) -> None:
        self.end_all()
        _adopt_orphans(False)

    def until_end(self, process: "subprocess.Popen[bytes]", deadline: float) -> bool:
        """Look until the process has ended, or the deadline (`time.monotonic`) has passed: then False."""
        while process.poll() is None:
            if time.monotonic() > deadline:
                return False
            self._look(self._members())
            time.sleep(SAMPLING_SECONDS)
        return True

    def end_all(self) -> None:
        """End every process that was seen and is still there."""
        left = [member for member in self.seen.values() if member.is_running()]
        for member in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(left, timeout=ENDING_SECONDS)
        for pid in self.seen.keys() - {self.root}:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)  # of an orphan that became ours

    def _members(self) -> list[psutil.Process]:
        """The living processes of the tree."""
        living = {pid: member for pid, member in self.seen.items() if member.is_running()}
        for member in psutil.process_iter(["ppid"]):
            parent = member.info["ppid"]
            if parent in living or (parent == os.getpid() and member.pid not in self.strangers):
                living.setdefault(member.pid, member)
        self.seen |= living
        return list(living.values())

    def _look(self, members: list[psutil.Process]) -> None:
        sizes = []
        for member in members:
            try:
                with member.oneshot():
                    used = member.cpu_times()
                    sizes.append(member.memory_info().rss)
            except psutil.NoSuchProcess:
                continue  # it ended between the two looks
            self.cpu_seconds[member.pid, member.create_time()] = used.user + used.system
        self.peak_bytes = max(self.peak_bytes, sum(sizes))
        self.processes = max(self.processes, len(sizes))


def _adopt_orphans(on: bool) -> None:
    """Whether processes below us whose parents have ended become our children, where the system can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)
