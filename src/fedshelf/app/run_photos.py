"""The photos that a store trains on in each round of a run.

The folder is looked at again before each round, so that a photo that the staff have corrected or taken back counts from
the next round on. What is validated on stays as it was when the run was set up: no photo moves from there to training,
and new photos are trained on. A round that is repeated has the same photos again, except those deleted since.
"""

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fedshelf.app.photos import NO_PHOTOS, StorePhotos, load_store_photos
from fedshelf.app.setup import OpenedSetup
from fedshelf.core.errors import DataError
from fedshelf.core.text import counted
from fedshelf.data.cache import PhotoCache
from fedshelf.data.folder import PhotoFolder, scan
from fedshelf.data.photo_files import Photo
from fedshelf.data.photo_set import PhotoSet
from fedshelf.storage.trained_photos import TrainedPhotosLog, photo_key

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The folder as it is now: its photos, and their keys where they can be read."""

    folder: PhotoFolder
    keys: Mapping[Photo, str]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Loaded:
    """Training photos, and the keys of their files."""

    photos: PhotoSet
    keys: tuple[str, ...]


_NOTHING = _Loaded(photos=NO_PHOTOS.train, keys=())


class RunPhotos:
    """The photos of one store in one run.

    Args:
        folder: the store's folder.
        opened: the setup's objects.
        cache: the cache of decoded photos.
        store: the store's name, for warnings.
        log: which photos were trained on in which round.
    """

    def __init__(
        self, folder: Path, opened: OpenedSetup, cache: PhotoCache, *, store: str, log: TrainedPhotosLog
    ) -> None:  # fmt: skip
        self._folder = folder
        self._opened = opened
        self._cache = cache
        self._store = store
        self._log = log
        self._at_setup = self._newest = _NOTHING
        self._to_note: tuple[int, tuple[str, ...]] | None = None  # a round, and the keys of its photos

    def load(self) -> StorePhotos:
        """Load the photos at a setup, and decide what is validated on if the run is new to this store.

        Raises:
            DataError: no photo can be decoded, or none belongs to a class in the catalogue.
            RunError: the photos cannot be noted.
        """
        found = self._find()
        if self._log.validation is None:
            self._log.start(map(self._place, found.folder.validation))
        folder = self._split(found)
        photos = load_store_photos(folder, self._opened, self._cache, store=self._store)
        keys = tuple(found.keys[photo] for photo in folder.train if photo in found.keys)
        self._at_setup = self._newest = _Loaded(photos=photos.train, keys=keys)
        return photos

    def for_round(self, round: int, *, fixed: bool = False) -> PhotoSet:
        """The training photos of a round, after another look at the folder.

        Args:
            round: the round.
            fixed: take the photos of the setup, without another look.

        If the folder cannot be read, they are those of the round before.
        """
        before = self._log.trained_in(round)
        loaded = self._at_setup if fixed else self._look(round, before)
        self._to_note = (round, loaded.keys) if before is None else None
        return loaded.photos

    def note(self) -> None:
        """Write down the photos of the round that `for_round` was called for, before it is trained.

        Raises:
            RunError: the disk is full, ...
        """
        if self._to_note is not None:
            self._log.add(*self._to_note)
            self._to_note = None

    def _look(self, round: int, before: frozenset[str] | None) -> "_Loaded":
        try:
            self._newest = self._look_again(round, before)
        except DataError as error:  # a network drive that is away for a while must not end the store's part in a run
            logger.warning("round %d is trained on the photos of the round before: %s", round, error)
        return self._newest

    def _look_again(self, round: int, before: frozenset[str] | None) -> "_Loaded":
        found = self._find()
        train = self._split(found).train
        if before is not None:
            train = tuple(photo for photo in train if found.keys.get(photo) in before)
        keys = tuple(found.keys[photo] for photo in train if photo in found.keys)
        if keys == self._newest.keys:
            return self._newest
        added, removed = len({*keys} - {*self._newest.keys}), len({*self._newest.keys} - {*keys})
        logger.info("round %d: %s added, %d removed since the round before", round, counted(added, "photo"), removed)
        folder = replace(found.folder, train=train, validation=())
        photos = load_store_photos(folder, self._opened, self._cache, store=self._store)
        return _Loaded(photos=photos.train, keys=keys)

    def _find(self) -> _Found:
        config = self._opened.config
        folder = scan(self._folder, val_fraction=config.val_fraction, seed=config.seed)
        photos = (*folder.train, *folder.validation)
        digests = self._cache.digests(photos)
        keys = {photos[i]: photo_key(digest, photos[i].class_path) for i, digest in digests.items()}
        return _Found(folder=folder, keys=keys)

    def _split(self, found: _Found) -> PhotoFolder:
        """The folder split as at the run's first setup; photos that are new since are trained on."""
        held_out, folder = self._log.validation or frozenset(), found.folder
        if folder.has_split:
            return folder
        photos = sorted((*folder.train, *folder.validation))
        return replace(
            folder,
            train=tuple(photo for photo in photos if self._place(photo) not in held_out),
            validation=tuple(photo for photo in photos if self._place(photo) in held_out),
        )

    def _place(self, photo: Photo) -> str:
        """Identify a photo by its place, as the split does: copies of a photo are different ones."""
        place = os.fsencode(photo.path.relative_to(self._folder))
        return hashlib.sha256(place).hexdigest()[:32]
