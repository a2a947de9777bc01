"""Tells in which round a photo was first trained on, from what this machine's clients have noted. Without torch."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fedshelf.app.state_directories import photo_folders, state_directories
from fedshelf.core.text import counted
from fedshelf.data.folder import has_split
from fedshelf.storage.trained_photos import TrainedPhotosLog, logs, photo_key


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class TrainedSince:
    """When a photo was first trained on.

    Attributes:
        run_id: the run.
        round: its round.
    """

    run_id: str
    round: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedPhotos:
    """The rounds of a store's photos.

    Attributes:
        data_dir: the store's photo folder.
        runs: what was noted of each run, oldest first.
    """

    data_dir: Path
    runs: tuple[TrainedPhotosLog, ...]

    def first_round(self, photo: str, path: str) -> TrainedSince | None:
        """When a photo was first trained on; None if it was not, or no client on this machine has noted it.

        Args:
            photo: SHA-256 of the file (hex).
            path: the file, relative to the photo folder.
        """
        key = self._key(photo, path)
        for run in self.runs:
            for change in run.changes:
                if key in change.added:
                    return TrainedSince(run_id=run.run_id, round=change.round)
        return None

    def is_in(self, photo: str, path: str, *, run_id: str, round: int) -> bool:
        """Whether a run was trained on a photo in some round up to `round`.

        Args:
            photo: see `first_round`.
            path: see `first_round`.
            run_id: the run.
            round: the round.
        """
        key = self._key(photo, path)
        changes = [change for run in self.runs if run.run_id == run_id for change in run.changes]
        return any(change.round <= round and key in change.added for change in changes)

    def _key(self, photo: str, path: str) -> str:
        folder = PurePosixPath(path).parent
        if has_split(self.data_dir) and folder.parts[:1] == ("train",):
            folder = folder.relative_to("train")
        return photo_key(photo, str(folder))

    def receipts(self, photos: Iterable[tuple[str, str]]) -> list[str]:
        """One sentence for each round that corrections came to: `12 corrections were in round 9 of RUN`.

        Args:
            photos: `photo` and `path` of each correction; see `first_round`.
        """
        rounds = Counter(since for photo, path in photos if (since := self.first_round(photo, path)))
        order = {run.run_id: place for place, run in enumerate(self.runs)}
        return [
            f"{counted(number, 'correction')} {'was' if number == 1 else 'were'} first in round {since.round} of "
            f"{since.run_id}"
            for since, number in sorted(rounds.items(), key=lambda item: (order[item[0].run_id], item[0].round))
        ]


def trained_on(data_dir: Path) -> TrainedPhotos:
    """What the clients on this machine that have used a photo folder have noted.

    Args:
        data_dir: the photo folder.

    Raises:
        RunError: a file of theirs cannot be read.
    """
    folder = str(data_dir.resolve())
    found = [log for state in state_directories() if folder in photo_folders(state) for log in logs(state)]
    return TrainedPhotos(data_dir=data_dir, runs=tuple(found))
