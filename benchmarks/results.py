"""The results of benchmarks: for people in `RESULTS.md`, one section each, and for programs in `results.json`.

Writing a section replaces it; writing a record adds it to the earlier ones.
"""

import datetime
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.measure import Sample
from fedshelf.storage.atomic_files import write_atomically

FEDSHELF, LIMIT, ONE_PROCESS = "FedShelf", "limit", "one process"
PATH = Path(__file__).with_name("RESULTS.md")
RECORDS = Path(__file__).with_name("results.json")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
HEADER = """# Results

Each section is written by its own command (`--write`) and names the date, the machine and the command. Figures are
medians; all programs were measured in turn, on the same machine, in the same run. Machines differ, and vary from hour
to hour: only ratios within a section are comparable. What is measured is defined in `workloads.py`, `wire_limit.py` and
`measure.py`; `docs/how-to/benchmarks.md` says how, and describes the peers and the guard over `results.json`.
"""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Medians of one program.

    Attributes:
        seconds: What the benchmark compares: wall clock of the whole run, or seconds of a round.
        ratio: Seconds relative to the limit's in the same runs.
        round_seconds: Seconds of a round.
        cpu_seconds: Processor time of all processes.
        peak_mb: Peak memory (10^6 bytes).
    """

    seconds: float
    ratio: float
    round_seconds: float
    cpu_seconds: float
    peak_mb: float

    def summary(self, limit: "Figures") -> dict[str, float]:
        """Return the object that `--json` prints."""
        return {
            "ours": round(self.seconds, 4), "limit": round(limit.seconds, 4), "ratio": round(self.ratio, 3),
            "peak_mb": round(self.peak_mb),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a benchmark.

    Attributes:
        summary: The object that `--json` prints.
        text: The same for a person, in Markdown.
        figures: By program.
        failed: Why programs failed, by program.
    """

    summary: Mapping[str, float]
    text: str
    figures: Mapping[str, Figures] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)


def round_seconds(sample: Sample) -> float:
    """Return the median over a run's rounds."""
    times: Sequence[float] = sample.figures["round_seconds"]
    return statistics.median(times)


def medians_of(runs: int) -> str:
    """Return what the figures of a section are."""
    return "One run of each program" if runs == 1 else f"Medians of {runs} runs, in turn"


def failures(failed: Mapping[str, str]) -> list[str]:
    """Return a paragraph about the programs that failed, if any did."""
    if not failed:
        return []
    return ["Failed, and left out above:\n\n" + "\n".join(f"* {name}: {reason}" for name, reason in failed.items())]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are right-aligned."""
    rule = ["---", *("---:" for _ in columns[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, rule, *rows))


def write(name: str, body: str, command: str) -> None:
    """Replace section `name` of RESULTS.md, or add it at the end."""
    text = PATH.read_text(encoding="utf-8") if PATH.exists() else HEADER
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    section = f"{start}\n## {name}\n\n{today}, {machine()}.\n\n`{command}`\n\n{body}\n{end}"
    if start in text:
        text = text[: text.index(start)] + section + text[text.index(end) + len(end) :]
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    write_atomically(PATH, text)


def record(name: str, outcome: Outcome) -> None:
    """Add a benchmark's result to its records; the newest is the last."""
    records = load()
    entry = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": machine(),
        "figures": {program: _rounded(asdict(figures)) for program, figures in outcome.figures.items()},
        "failed": dict(outcome.failed),
    }
    records.setdefault(name, []).append(entry)
    write_atomically(RECORDS, json.dumps(records, indent=1, sort_keys=True) + "\n")


def load() -> dict[str, list[dict[str, Any]]]:
    """Return all records by benchmark, oldest first."""
    return json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else {}


def _rounded(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Round to four significant digits: the rest is noise."""
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in figures.items()}


def machine() -> str:
    """Describe the machine and the versions in one line."""
    cpu = _cpu_info()
    flags = [flag for flag in FLAGS if flag in cpu.get("flags", "").split()]
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{len(os.sched_getaffinity(0))} cores ({cpu.get('model name', platform.machine())}; "
        f"{', '.join(flags) or 'no vector flags known'}), {memory:.0f} GiB, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def _cpu_info() -> dict[str, str]:
    """Read the first processor's entries of /proc/cpuinfo; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8").split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
