"""Which photos a store has trained on in which round of a run, one JSON line a round.

    {"run": RUN, "validation": [PLACE, …]}        the first line: the photos that the run never trains on
    {"round": 1, "added": [KEY, …], "removed": []}
    {"round": 2, "added": [], "removed": [KEY, …]}

A line is fsynced before its round is trained. So a round that is repeated, after a crash or because the server asks
again, is trained on the same photos although the folder has changed since; and what became of a photo can be told.
A line that a power cut has left incomplete is ignored: its round was not trained.

A photo's key depends on its content and its product, not on its place.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedshelf.storage.atomic_files import make_own_folder, open_private, translating_os_errors, write_atomically

FOLDER = "trained-photos"
"""Folder of these files in a client's state directory."""
MOST_RUNS = 5
"""Runs whose files are kept."""
_SUFFIX = ".jsonl"


def photo_key(digest: str, class_path: str) -> str:
    """Identify a photo of a product.

    Args:
        digest: SHA-256 of the file (hex).
        class_path: the product's folder below the data folder, separated by '/'.
    """
    return hashlib.sha256(f"{digest}\n{class_path}".encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundChange:
    """How the training photos of a round differ from those of the round before it in the file.

    Attributes:
        round: the round.
        added: keys of new photos.
        removed: keys of photos that are gone.
    """

    round: int
    added: frozenset[str]
    removed: frozenset[str]


class TrainedPhotosLog:
    """The file of one run. For one process and one thread.

    Args:
        folder: the folder of these files.
        run_id: the run.

    Attributes:
        run_id: the run.
        validation: identifies the photos that the run never trains on; None if the file does not exist.
        changes: by line, the change of a round.

    Raises:
        RunError: the file cannot be read.
    """

    def __init__(self, folder: Path, run_id: str) -> None:
        self._folder = folder
        self._path = folder / (hashlib.sha256(run_id.encode()).hexdigest()[:32] + _SUFFIX)  # any text is a run id
        self.run_id = run_id
        self.validation: frozenset[str] | None = None
        self.changes: list[RoundChange] = []
        self._read()

    def start(self, validation: Iterable[str]) -> None:
        """Create the file, and delete those of the oldest runs.

        Raises:
            RunError: the disk is full, ...
        """
        make_own_folder(self._folder)
        self.validation, self.changes = frozenset(validation), []
        write_atomically(self._path, _line({"run": self.run_id, "validation": sorted(self.validation)}))
        others = sorted(self._folder.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
        for path in others[:-MOST_RUNS]:
            path.unlink(missing_ok=True)

    def trained_in(self, round: int) -> frozenset[str] | None:
        """Keys of the photos of a round that was trained before; None for a newer one."""
        if all(change.round < round for change in self.changes):
            return None
        return self._after([change for change in self.changes if change.round <= round])

    def add(self, round: int, keys: Iterable[str]) -> None:
        """Note the photos of a new round.

        Raises:
            RunError: the disk is full, ...
        """
        before, now = self._after(self.changes), frozenset(keys)
        change = RoundChange(round=round, added=now - before, removed=before - now)
        fields = {"round": round, "added": sorted(change.added), "removed": sorted(change.removed)}
        with translating_os_errors("write", self._path):
            descriptor = open_private(self._path, os.O_WRONLY | os.O_APPEND)
            with os.fdopen(descriptor, "wb") as file:
                file.write(_line(fields))
                file.flush()
                os.fsync(descriptor)
        self.changes.append(change)

    def _after(self, changes: Sequence[RoundChange]) -> frozenset[str]:
        keys: set[str] = set()
        for change in changes:
            keys = (keys | change.added) - change.removed
        return frozenset(keys)

    def _read(self) -> None:
        if not self._path.exists():
            return
        with translating_os_errors("read", self._path):
            lines = self._path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        try:
            first, *rest = map(json.loads, whole)
            if first["run"] != self.run_id:
                return
            self.validation = frozenset(map(str, first["validation"]))
            self.changes = [
                RoundChange(
                    round=int(line["round"]), added=frozenset(line["added"]), removed=frozenset(line["removed"])
                )
                for line in rest
            ]
        except (ValueError, TypeError, KeyError):  # damaged: the run's photos are chosen anew
            self.validation, self.changes = None, []
            return
        if len(whole) < len(lines):
            write_atomically(self._path, b"".join(whole))


def logs(state_dir: Path) -> list[TrainedPhotosLog]:
    """The files in a client's state directory, oldest run first.

    Raises:
        RunError: one of them cannot be read.
    """
    found = []
    for path in sorted((state_dir / FOLDER).glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns):
        try:
            with path.open("rb") as file:
                run_id = str(json.loads(file.readline())["run"])
        except (OSError, ValueError, TypeError, KeyError):
            continue
        found.append(TrainedPhotosLog(state_dir / FOLDER, run_id))
    return found


def _line(fields: dict[str, object]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"
