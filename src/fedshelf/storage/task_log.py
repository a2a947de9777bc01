"""The tasks that a client has accepted, one JSON line each, so that limits hold over restarts.

A line is fsynced before the task is done. The line of a power cut in the middle of a write is ignored.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from fedshelf.storage.atomic_files import translating_os_errors, write_atomically

MOST_KEPT = 20_000
"""Tasks that are remembered; when a client starts, older ones are dropped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AcceptedTask:
    """A task that a client has accepted.

    Attributes:
        run_id: the run.
        purpose: what was asked for.
        round: the round.
        attempt: the attempt at the round.
        digest: digest of all that the server sent to compute with.
    """

    run_id: str
    purpose: str
    round: int
    attempt: int
    digest: str


class TaskLog:
    """The log in one file. For one process and one thread.

    Args:
        path: the file.

    Attributes:
        accepted: the tasks, oldest first, with the time in seconds since 1970 at which each was accepted.

    Raises:
        RunError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.accepted: dict[AcceptedTask, float] = {}
        lines: list[bytes] = []
        if path.exists():
            with translating_os_errors("read", path):
                lines = path.read_bytes().splitlines(keepends=True)
        for line in lines[-MOST_KEPT:]:
            try:
                entry = json.loads(line)
                self.accepted[AcceptedTask(**entry["task"])] = float(entry["at"])
            except (ValueError, TypeError, KeyError):
                continue
        if len(lines) > MOST_KEPT or (lines and not lines[-1].endswith(b"\n")):
            write_atomically(path, b"".join(_line(task, at) for task, at in self.accepted.items()))

    def add(self, task: AcceptedTask, at: float) -> None:
        """Append a task.

        Raises:
            RunError: the disk is full, ...
        """
        with translating_os_errors("write", self._path):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(_line(task, at))
                file.flush()
                os.fsync(descriptor)
        self.accepted[task] = at


def _line(task: AcceptedTask, at: float) -> bytes:
    return json.dumps({"at": at, "task": asdict(task)}, separators=(",", ":")).encode() + b"\n"
