"""Linux control groups: the limits that a container or scheduler sets on this process."""

from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def folders(controller: str, *, groups: Path = GROUPS, own_group: Path = OWN_GROUP) -> Iterator[Path]:
    """Yield the folders of this process's control group and its parents (version 2, then 1); none on other systems.

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
