"""Photos that the staff have corrected, filed among a store's training photos.

A correction is a line in a journal and a photo. The photo lies in the product's folder, where the next round finds it;
or, out of a scan's sight, in the inbox (its product is unknown) or the review area (it is suspicious)::

    DATA_DIR/Fruit/Apple/Gala/correction-5f0c….jpg
    DATA_DIR/.fedshelf/corrections.jsonl     the journal, a hash chain
    DATA_DIR/.fedshelf/{inbox,review}/PRODUCT/correction-….jpg
    DATA_DIR/.fedshelf/staging/…             photos whose journal line is about to be written

They are kept beside the photos, not in FEDSHELF_HOME, because they are the store's photos: moved, backed up and deleted
with the others, and renamed into place within one file system.

A change is made in three steps under a lock, so that a process that is killed leaves it whole or absent::

    1  stage the photo                          killed here: the next process deletes the photo
    2  append a line to the journal, fsynced    the change is made from now on
    3  move or delete the photo                 killed here: the next process does this step
"""

import hashlib
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedshelf.config.places import folder_name
from fedshelf.core.errors import DataError, UsageError
from fedshelf.core.guess import Guess
from fedshelf.core.text import counted, from_filesystem, to_filesystem
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.filesystem import folder_problem
from fedshelf.data.folder import class_folder
from fedshelf.data.photo_files import PRIVATE_FOLDER
from fedshelf.edge.serving.correction_journal import ACTIVE, WAITING, Correction, Journal, Status, fields_of
from fedshelf.edge.serving.product_folders import ProductFolders, checked_name
from fedshelf.storage.atomic_files import make_own_folder, sync_folder, translating_os_errors, write_atomically
from fedshelf.storage.hash_chain import timestamp
from fedshelf.storage.lock import file_lock

SUSPICIOUS = 0.98
"""Probability of another product from which on a correction is held for review."""
DAILY_CAP = 200
"""Corrections of one day (UTC) that are trained on without a review."""
MOST_WAITING = 2_000
"""Photos in the inbox and the review area together. Further ones are refused."""
JOURNAL = Path(PRIVATE_FOLDER) / "corrections.jsonl"
_PHOTO_MODE = 0o644  # the client may run as another user


class TooManyWaitingError(DataError):
    """The inbox and the review area are full."""


class UnknownCorrectionError(UsageError):
    """There is no correction with this id, or not in this state."""


class Corrections:
    """The corrections of one data folder. Safe to use from several processes; for one thread at a time in each.

    Args:
        data_dir: the store's photo folder.
        labels: the model's products [K].
        paths: their folders and names [K].
        daily_cap: corrections of a day that need no review.
        create: create the private folder if it is missing.

    Raises:
        UsageError: there is no such folder.
        RunError: the private folder cannot be used, or the journal was altered.
    """

    def __init__(
        self, data_dir: Path, *, labels: tuple[str, ...] = (), paths: tuple[str, ...] = (), daily_cap: int = DAILY_CAP,
        create: bool = True,
    ) -> None:  # fmt: skip
        if problem := folder_problem(data_dir):
            raise UsageError(f"photo folder '{data_dir}': {problem}")
        self._data_dir = data_dir
        self._private = data_dir / PRIVATE_FOLDER
        self._staging = self._private / "staging"
        self._daily_cap = daily_cap
        self._folders = ProductFolders(data_dir=data_dir, labels=labels, paths=paths)
        self._journal = Journal(data_dir / JOURNAL)
        self._read_size = -1  # of the journal, when it was last read; -1: read it again
        if create:
            self._make_folders()
        if self._private.is_dir():
            with file_lock(self._lock):
                self._refresh()

    @property
    def data_dir(self) -> Path:
        """The store's photo folder."""
        return self._data_dir

    @property
    def version(self) -> int:
        """A number that is another one after each change, by whatever process."""
        return self._journal.size

    def all(self) -> tuple[Correction, ...]:
        """All corrections, oldest first."""
        if self._private.is_dir():
            with file_lock(self._lock):
                self._refresh()
        return tuple(self._known.values())

    def file(self, copy: bytes, product: str, *, source: str, guess: Guess | None = None) -> Correction:
        """File a corrected photo.

        The same photo for the same product is filed once; for another product, it replaces the earlier correction.

        Args:
            copy: the photo as it is to be kept (`photo_copy.clean_copy`).
            product: what it shows.
            source: SHA-256 of the photo as it was sent (hex).
            guess: the model's first guess for it.

        Returns:
            The correction; its status says where the photo went.

        Raises:
            DataError: the product's name cannot be used, or the photo folder cannot be read.
            TooManyWaitingError: too many photos wait in the inbox and for review.
            RunError: the disk is full, ...; nothing is filed.
        """
        name = product if product in self._folders.labels else checked_name(product)
        with file_lock(self._lock):
            self._refresh()
            found = self._folders.find(name)
            label = name if found is None else found.label
            earlier = [c for c in self._known.values() if c.source == source and c.status in ACTIVE]
            if same := [correction for correction in earlier if correction.product == label]:
                return same[0]
            status, reason = Status.INBOX, ""
            if found is not None:
                reason = self._suspicion(label, guess)
                status = Status.REVIEW if reason else Status.TRAINING
            if status in WAITING and sum(c.status in WAITING for c in self._known.values()) >= MOST_WAITING:
                raise TooManyWaitingError(
                    f"{counted(MOST_WAITING, 'correction')} wait for a person: accept or reject them with 'fedshelf "
                    f"edge corrections review {self._data_dir}'"
                )
            new = self._make(copy, label, source, status, reason, found.folder if found else None, guess)
            self._commit(
                {"event": "filed", **fields_of(new), "replaces": [correction.id for correction in earlier]}, copy=copy
            )
        return self._known[new.id]

    def undo(self, id: str) -> Correction:
        """Take a correction back: its photo is deleted.

        Raises:
            UnknownCorrectionError: there is no such correction, or it was taken back before.
            RunError: see `file`.
        """
        return self._change(id, {"event": "undone"}, ACTIVE)

    def reject(self, id: str) -> Correction:
        """Delete a photo that waits for a person.

        Raises:
            UnknownCorrectionError: there is no such correction, or it does not wait.
            RunError: see `file`.
        """
        return self._change(id, {"event": "rejected"}, WAITING)

    def accept(self, id: str) -> Correction:
        """Move a photo that waits for a person to the training photos. A new product gets a folder of its name.

        Raises:
            UnknownCorrectionError: there is no such correction, or it does not wait.
            DataError: the new product's name cannot be a folder's.
            RunError: see `file`.
        """
        return self._change(id, {"event": "accepted"}, WAITING)

    def file_known(self, catalogue: Catalogue) -> Counter[str]:
        """Move photos in the inbox to the training photos whose product the catalogue has now.

        Args:
            catalogue: a run's catalogue, with the products that this object was made with.

        Returns:
            The number of photos by product.

        Raises:
            DataError: the photo folder cannot be read, or a product's name cannot be a folder's.
            RunError: see `file`.
        """
        filed: Counter[str] = Counter()
        if not self._private.is_dir():
            return filed
        with file_lock(self._lock):
            self._refresh()
            for correction in [c for c in self._known.values() if c.status is Status.INBOX]:
                index = catalogue.index_of(class_folder(correction.product))
                found = self._folders.find(correction.product if index is None else catalogue.names[index])
                if found is not None and found.label in self._folders.labels:
                    path = f"{from_filesystem(str(found.folder))}/{_file_name(correction.id)}"
                    self._commit({"event": "accepted", "path": path, "id": correction.id})
                    filed[found.label] += 1
        return filed

    @property
    def _known(self) -> dict[str, Correction]:
        return self._journal.known

    @property
    def _lock(self) -> Path:
        return self._private / "lock"

    def _make_folders(self) -> None:
        for folder in (self._private, self._staging):
            make_own_folder(folder)

    def _suspicion(self, label: str, guess: Guess | None) -> str:
        """Why a correction needs a review; empty if it does not."""
        if guess is not None and guess.label != label and guess.probability >= SUSPICIOUS:
            return f"the model is {100 * guess.probability:.1f} % sure that it is {guess.label}"
        today = timestamp()[:10]
        num_today = sum(c.time[:10] == today and c.status == Status.TRAINING for c in self._known.values())
        if num_today >= self._daily_cap:
            return f"{counted(num_today, 'correction')} were made today, more are reviewed"
        return ""

    def _make(
        self, copy: bytes, label: str, source: str, status: Status, reason: str, folder: Path | None,
        guess: Guess | None,
    ) -> Correction:  # fmt: skip
        made = secrets.token_hex(8)
        if status is Status.TRAINING and folder is not None:
            place = folder
        else:
            place = Path(PRIVATE_FOLDER) / status.value / folder_name(label)
        return Correction(
            id=made, time=timestamp(), product=label, status=status,
            path=from_filesystem(str(place / _file_name(made))),
            destination="" if folder is None else from_filesystem(str(folder)), source=source,
            photo=hashlib.sha256(copy).hexdigest(), reason=reason, predicted="" if guess is None else guess.label[:200],
            probability=0.0 if guess is None else round(guess.probability, 6),
        )  # fmt: skip

    def _change(self, id: str, event: dict[str, Any], allowed: frozenset[Status]) -> Correction:
        if not self._private.is_dir():
            raise UnknownCorrectionError(f"'{self._data_dir}' has no corrections")
        with file_lock(self._lock):
            self._refresh()
            found = self._known.get(id)
            if found is None:
                raise UnknownCorrectionError(
                    f"'{self._data_dir}' has no correction '{id}': 'fedshelf edge corrections list' shows them"
                )
            if found.status not in allowed:
                raise UnknownCorrectionError(
                    f"correction '{id}' cannot be {event['event']}: it is {found.status.value}"
                )
            if event["event"] == "accepted":
                event = {**event, "path": self._accepted_path(found)}
            self._commit({**event, "id": id})
        return self._known[id]

    def _accepted_path(self, correction: Correction) -> str:
        folder = correction.destination
        if not folder:
            known = self._folders.find(correction.product)  # a folder may have been made for it since
            if known is not None:
                folder = from_filesystem(str(known.folder))
            else:
                folder = from_filesystem(str(self._folders.new(correction.product)))
        return f"{folder}/{_file_name(correction.id)}"

    def _commit(self, event: dict[str, Any], *, copy: bytes | None = None) -> None:
        staged = self._staging / _file_name(event["id"])
        try:
            if "path" in event:  # where the photo will go: nothing is committed if that folder cannot be made
                self._make_folder_of(self._place(event["path"]))
            if copy is not None:
                write_atomically(staged, copy, mode=_PHOTO_MODE)
            self._read_size = -1  # until the photos are in place
            changed = self._journal.append(event)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        self._finish(changed)

    def _refresh(self) -> None:
        """Read what other processes have written, and finish what a killed one has begun."""
        if self._journal.size == self._read_size:
            return
        self._make_folders()
        self._finish(self._journal.read())
        staged = {_file_name(known) for known in self._known}
        with translating_os_errors("read", self._staging):
            for path in self._staging.iterdir():
                if path.name not in staged:  # it was never committed
                    path.unlink(missing_ok=True)

    def _finish(self, changed: Mapping[str, str]) -> None:
        """Put the photos of changed corrections where they belong, from where each was before."""
        for name, moved_from in changed.items():
            self._put_in_place(self._known[name], moved_from)
        self._read_size = self._journal.size

    def _put_in_place(self, correction: Correction, moved_from: str) -> None:
        """Put a correction's photo where it belongs. Done twice, it does nothing the second time."""
        place, staged = self._place(correction.path), self._staging / _file_name(correction.id)
        before = [staged, *([self._place(moved_from)] if moved_from and moved_from != correction.path else [])]
        with translating_os_errors("write", place):
            if correction.status not in ACTIVE:
                for path in (*before, place):
                    _unlink(path)
                return
            for path in before:
                if path.exists():
                    self._make_folder_of(place)
                    path.replace(place)
                    sync_folder(place.parent)
                    sync_folder(path.parent)

    def _make_folder_of(self, path: Path) -> None:
        """Create a photo's folder: a product's for everybody the umask allows, others for their owner alone."""
        with translating_os_errors("make folder", path.parent):
            private = path.is_relative_to(self._private)
            missing = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
            for folder in reversed(missing):
                folder.mkdir(mode=0o700 if private else 0o777, exist_ok=True)
                sync_folder(folder.parent)
            path.parent.mkdir(exist_ok=True)  # an error if it is a file

    def _place(self, path: str) -> Path:
        return self._data_dir / to_filesystem(path)


def unknown_products(corrections: Sequence[Correction]) -> Counter[str]:
    """The number of photos in the inbox, by the product's name."""
    return Counter(correction.product for correction in corrections if correction.status is Status.INBOX)


def _unlink(path: Path) -> None:
    try:
        path.unlink()
    except (FileNotFoundError, NotADirectoryError):
        return
    sync_folder(path.parent)


def _file_name(id: str) -> str:
    return f"correction-{id}.jpg"
