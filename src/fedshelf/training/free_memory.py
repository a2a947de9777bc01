"""Memory that this process may still use."""

from collections.abc import Iterator
from pathlib import Path

import psutil

from fedshelf.training import control_groups

_VERSIONS = (("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"))
"""By version of control groups: files of the limit and the usage, and the prefix of names in ``memory.stat``."""


def free_memory(*, groups: Path = control_groups.GROUPS, own_group: Path = control_groups.OWN_GROUP) -> int:
    """Free bytes of the machine and of the container, whichever is less.

    The page cache counts as free: the system reclaims it when needed.

    Args:
        groups: where the system describes control groups.
        own_group: the file that names this process's groups.
    """
    left = [psutil.virtual_memory().available]
    for group in control_groups.folders("memory", groups=groups, own_group=own_group):
        left += _left(group)
    return max(0, min(left))


def lacks_memory(error: BaseException) -> bool:
    """Whether torch raised `error` because memory ran out."""
    text = str(error).lower()
    return any(words in text for words in ("out of memory", "not enough memory", "can't allocate memory"))


def _left(group: Path) -> Iterator[int]:
    for most, taken, prefix in _VERSIONS:
        try:
            limit, used = (int((group / name).read_text()) for name in (most, taken))
            counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cached = sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        except (OSError, ValueError):  # no such file, or "max": unlimited
            continue
        yield limit - used + cached
