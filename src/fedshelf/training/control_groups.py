"""Where Linux says what a container or a scheduler lets this process have."""

from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def folders(controller: str, *, groups: Path = GROUPS, own_group: Path = OWN_GROUP) -> Iterator[Path]:
    """The folders of this process' control group and of those around it (version 2, then 1); none elsewhere.

    Args:
        controller: whose limits are looked for, such as ``cpu``.
        groups: where the system describes control groups.
        own_group: where it says which of them is this process'.
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
