"""What this process may use of the machine: cores and memory, within the limits of a container or scheduler.

On Linux, only the memory of the machine is asked from psutil.
"""

import os
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")
_CPUS = Path("/sys/devices/system/cpu")
_VERSIONS = (("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"))
"""By version of control groups: files of the limit and the usage, and the prefix of names in ``memory.stat``."""


def default_threads(
    processes: int = 1, *, cpus: Path = _CPUS, groups: Path = GROUPS, own_group: Path = OWN_GROUP
) -> int:
    """Physical cores that this process may use, divided among `processes`; at least one.

    A second thread on a core shares its arithmetic units and adds no throughput. Containers and schedulers restrict a
    process by affinity (which cores) or by a quota of processor time (how many, on average); both are respected.

    Args:
        processes: number of processes that train at the same time.
        cpus: where the system describes its processors.
        groups: where it describes control groups.
        own_group: the file that names this process's groups.
    """
    cores = _physical_cores(cpus)
    folders = _control_groups("cpu", groups=groups, own_group=own_group)
    quota = min((quota for group in folders for quota in _quota(group)), default=float(cores))
    return max(1, int(min(float(cores), quota) / max(1, processes)))


def free_memory(*, groups: Path = GROUPS, own_group: Path = OWN_GROUP) -> int:
    """Free bytes of the machine and of the container, whichever is less.

    The page cache counts as free: the system reclaims it when needed.

    Args:
        groups: where the system describes control groups.
        own_group: the file that names this process's groups.
    """
    import psutil

    left = [psutil.virtual_memory().available]
    for group in _control_groups("memory", groups=groups, own_group=own_group):
        left += _left(group)
    return max(0, min(left))


def lacks_memory(error: BaseException) -> bool:
    """Whether torch raised `error` because memory ran out."""
    text = str(error).lower()
    return any(words in text for words in ("out of memory", "not enough memory", "can't allocate memory"))


def _control_groups(controller: str, *, groups: Path, own_group: Path) -> Iterator[Path]:
    """Yield the folders of this process's control group (version 2, then 1) and its parents; none on other systems.

    Args:
        controller: the controller, such as ``cpu``.
        groups: where the system describes control groups.
        own_group: the file that names this process's groups.
    """
    try:
        lines = [line.strip().split(":", 2) for line in own_group.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in (line for line in lines if len(line) == 3):
        for base in [groups] if not controllers else [groups / controllers, groups / controller]:
            folder = base / path.lstrip("/")
            for place in (folder, *folder.parents):
                yield place
                if place == base:
                    break


def _physical_cores(cpus: Path) -> int:
    """Distinct cores among the logical processors that this process may use."""
    if not hasattr(os, "sched_getaffinity"):  # macOS and Windows
        return _reported_cores()
    allowed = os.sched_getaffinity(0)
    try:
        return len({_core(cpus / f"cpu{number}" / "topology") for number in allowed})
    except OSError:
        return min(len(allowed), _reported_cores())


def _reported_cores() -> int:
    import psutil

    return psutil.cpu_count(logical=False) or 1


def _core(topology: Path) -> tuple[str, ...]:
    return tuple((topology / name).read_text().strip() for name in ("physical_package_id", "core_id"))


def _quota(group: Path) -> Iterator[float]:
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / name).read_text() for name in names).split()
        except (OSError, ValueError):
            continue
        if quota.isdigit() and period.isdigit() and int(period):  # otherwise "max" or -1: unlimited
            yield int(quota) / int(period)


def _left(group: Path) -> Iterator[int]:
    for most, taken, prefix in _VERSIONS:
        try:
            limit, used = (int((group / name).read_text()) for name in (most, taken))
            counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cached = sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        except (OSError, ValueError):  # no such file, or "max": unlimited
            continue
        yield limit - used + cached
