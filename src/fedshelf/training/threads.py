"""The number of threads for a training process."""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

from fedshelf.training import control_groups

_CPUS = Path("/sys/devices/system/cpu")


def default_threads(
    processes: int = 1, *, cpus: Path = _CPUS, groups: Path = control_groups.GROUPS,
    own_group: Path = control_groups.OWN_GROUP,
) -> int:  # fmt: skip
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
    quota = min(_quotas(groups, own_group), default=float(cores))
    return max(1, int(min(float(cores), quota) / max(1, processes)))


def _physical_cores(cpus: Path) -> int:
    """Distinct cores among the logical processors that this process may use."""
    if not hasattr(os, "sched_getaffinity"):  # macOS and Windows
        return psutil.cpu_count(logical=False) or 1
    allowed = os.sched_getaffinity(0)
    try:
        return len({_core(cpus / f"cpu{number}" / "topology") for number in allowed})
    except OSError:
        return min(len(allowed), psutil.cpu_count(logical=False) or 1)


def _core(topology: Path) -> tuple[str, ...]:
    return tuple((topology / name).read_text().strip() for name in ("physical_package_id", "core_id"))


def _quotas(groups: Path, own_group: Path) -> Iterator[float]:
    """Quotas, in cores, of this process's control group and its parents."""
    for group in control_groups.folders("cpu", groups=groups, own_group=own_group):
        yield from _quota(group)


def _quota(group: Path) -> Iterator[float]:
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / name).read_text() for name in names).split()
        except (OSError, ValueError):
            continue
        if quota.isdigit() and period.isdigit() and int(period):  # otherwise "max" or -1: unlimited
            yield int(quota) / int(period)
