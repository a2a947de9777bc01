"""Runs a command as a fresh process and measures all of it: process start and `import torch` included."""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.workloads import FIRST_STEP_FILE

SAMPLING_SECONDS = 0.05
MB = 1_000_000


class MeasurementError(Exception):
    """A measured process failed; its own words are on the standard error."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One run of a command, with all processes it started.

    Attributes:
        seconds: wall clock, from before the process exists to after it has ended.
        cpu_seconds: user and system time.
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
        used_before = _cpu_seconds()
        started = time.monotonic()
        with subprocess.Popen(
            [sys.executable, "-m", *command], env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            peak_bytes, processes = _watch(process)
            output, _ = process.communicate()
        seconds, cpu_seconds = time.monotonic() - started, _cpu_seconds() - used_before
        if process.returncode:
            raise MeasurementError(f"python -m {' '.join(command)} ended with code {process.returncode}")
        lines = first_step_file.read_text().split() if first_step_file.exists() else []
    return Sample(
        seconds=seconds, cpu_seconds=cpu_seconds, peak_mb=peak_bytes / MB, processes=processes,
        first_step=min(map(float, lines)) - started if lines else None, figures=json.loads(output.splitlines()[-1]),
    )  # fmt: skip


def _watch(process: "subprocess.Popen[str]") -> tuple[int, int]:
    """Until the process ends: the peak of the tree's resident bytes, and of its number of processes."""
    root = psutil.Process(process.pid)
    peak_bytes = most = 0
    while process.poll() is None:
        sizes = []
        try:
            for member in (root, *root.children(recursive=True)):
                try:
                    sizes.append(member.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue  # it ended between the two looks
        except psutil.NoSuchProcess:
            break
        peak_bytes, most = max(peak_bytes, sum(sizes)), max(most, len(sizes))
        time.sleep(SAMPLING_SECONDS)
    return peak_bytes, most


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # children that were waited for, and theirs
    return used.ru_utime + used.ru_stime
