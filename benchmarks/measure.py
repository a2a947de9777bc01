"""Runs a command as a fresh process and measures all of it: process start and `import torch` included."""

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

SAMPLING_SECONDS = 0.05
MB = 1_000_000


class MeasurementError(Exception):
    """A measured process failed; its own words are on the standard error."""


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


def alternate(commands: Mapping[str, Sequence[str]], runs: int) -> dict[str, list[Sample]]:
    """Run all commands in turn, `runs` times over, so that a change of the machine's mood meets all alike."""
    samples: dict[str, list[Sample]] = {name: [] for name in commands}
    for run in range(1, runs + 1):
        for name, command in commands.items():
            sample = measure(command)
            samples[name].append(sample)
            print(
                f"run {run}/{runs}  {name:<12} {sample.seconds:7.2f} s  {sample.cpu_seconds:7.2f} CPU s  "
                f"{sample.peak_mb:7.0f} MB",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    return samples


def measure(command: Sequence[str]) -> Sample:
    """Run `python -m <command>` and measure it.

    Raises:
        MeasurementError: the command failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        first_step_file = Path(folder) / "first-step"
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", FIRST_STEP_FILE: str(first_step_file)}
        watch = Watch()
        started = time.monotonic()
        with subprocess.Popen(
            [sys.executable, "-m", *command], env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            watch.until_end(process)
            output, _ = process.communicate()
        seconds = time.monotonic() - started
        if process.returncode:
            raise MeasurementError(f"python -m {' '.join(command)} ended with code {process.returncode}")
        lines = first_step_file.read_text().split() if first_step_file.exists() else []
    return Sample(
        seconds=seconds, cpu_seconds=sum(watch.cpu_seconds.values()), peak_mb=watch.peak_bytes / MB,
        processes=watch.processes,
        first_step=min(map(float, lines)) - started if lines else None, figures=json.loads(output.splitlines()[-1]),
    )  # fmt: skip


@dataclass(kw_only=True)
class Watch:
    """What a tree of processes uses. CPU time is what was seen at the last look at each: a process that is not its
    parent's to wait for (a fork server's, say) is in no other count."""

    peak_bytes: int = 0
    processes: int = 0
    cpu_seconds: dict[tuple[int, float], float] = field(default_factory=dict)

    def until_end(self, process: "subprocess.Popen[str]") -> None:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                self._look([root, *root.children(recursive=True)])
            except psutil.NoSuchProcess:
                break
            time.sleep(SAMPLING_SECONDS)

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
