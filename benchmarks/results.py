"""`benchmarks/RESULTS.md`: one section per benchmark, each replaced by the next run that is asked to write."""

import datetime
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

PATH = Path(__file__).with_name("RESULTS.md")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
HEADER = """# Results

Each section is written by its own command (`--write`) and says when and where it was measured. Figures are medians;
both sides ran in turn on the same machine in the same run. Machines differ, and have their moods: only ratios within
one section mean anything. What is measured stands in `workloads.py`, `wire_limit.py` and `measure.py`.
"""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are figures."""
    rule = ["---", *("---:" for _ in columns[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, rule, *rows))


def write(name: str, body: str, command: str) -> None:
    """Replace section `name`, or add it at the end."""
    text = PATH.read_text(encoding="utf-8") if PATH.exists() else HEADER
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    section = f"{start}\n## {name}\n\n{today}, {machine()}.\n\n`{command}`\n\n{body}\n{end}"
    if start in text:
        text = text[: text.index(start)] + section + text[text.index(end) + len(end) :]
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    PATH.write_text(text, encoding="utf-8")


def machine() -> str:
    """The machine and the versions, in a line."""
    cpu = _cpu_info()
    flags = [flag for flag in FLAGS if flag in cpu.get("flags", "").split()]
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{len(os.sched_getaffinity(0))} cores ({cpu.get('model name', platform.machine())}; "
        f"{', '.join(flags) or 'no vector flags known'}), {memory:.0f} GiB, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def _cpu_info() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; nothing where there is no such file."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8").split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
