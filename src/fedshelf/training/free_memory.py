"""How much memory this process may still take."""

from collections.abc import Iterator
from pathlib import Path

import psutil

from fedshelf.training import control_groups

_VERSIONS = (("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"))
"""By version of control groups: the limit, what is taken, and how the names in ``memory.stat`` begin."""


def free_memory(*, groups: Path = control_groups.GROUPS, own_group: Path = control_groups.OWN_GROUP) -> int:
    """Bytes that the machine has left, and the container that this process may run in.

    What files are cached in counts as left: the system gives that up when it is needed.
    """
    left = [psutil.virtual_memory().available]
    for group in control_groups.folders("memory", groups=groups, own_group=own_group):
        left += _left(group)
    return max(0, min(left))


def lacks_memory(error: BaseException) -> bool:
    """Whether torch raised `error` because it got no memory."""
    text = str(error).lower()
    return any(words in text for words in ("out of memory", "not enough memory", "can't allocate memory"))


def _left(group: Path) -> Iterator[int]:
    for most, taken, prefix in _VERSIONS:
        try:
            limit, used = (int((group / name).read_text()) for name in (most, taken))
            counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cached = sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        except (OSError, ValueError):  # no such file, or "max": no bound
            continue
        yield limit - used + cached
