"""Sources of the simulated clients' photos."""

import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fedshelf import __version__
from fedshelf.app.components import OpenedSetup, StorePhotos, store_photos, test_photos
from fedshelf.core.errors import DataError
from fedshelf.core.messages import PROTOCOL_VERSION, ClassFolder, Join
from fedshelf.core.text import to_filesystem
from fedshelf.data.cache import PhotoCache
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.dataset import PhotoSet
from fedshelf.data.folder import scan
from fedshelf.data.health import usable_classes
from fedshelf.data.layout import store_folders
from fedshelf.training.features import featurized

logger = logging.getLogger(__name__)

MOST_OPEN = 4096  # maximum number of stores whose photo files a process keeps mapped


class Stores(Protocol):
    """The photos of many stores. Picklable: spawned workers get a copy."""

    @property
    def has_test(self) -> bool:
        """Whether there are photos for central evaluation."""
        ...

    def names(self) -> tuple[str, ...]:
        """Return the names of all stores, sorted."""
        ...

    def classes(self, name: str) -> tuple[ClassFolder, ...]:
        """Return the class folders of store `name`."""
        ...

    def num_photos(self, name: str, catalogue: Catalogue) -> int | None:
        """Return the number of training photos of `name`, or None if its photos must be opened to know."""
        ...

    def photos(self, name: str, opened: OpenedSetup) -> StorePhotos:
        """Return the photos of store `name`, labeled for the setup."""
        ...

    def test(self, opened: OpenedSetup) -> PhotoSet:
        """Return the photos for central evaluation."""
        ...


@dataclass(frozen=True, kw_only=True)
class FolderStores:
    """One folder per store below `root`, decoded through the cache.

    Attributes:
        root: the folder of all stores.
        cache: the folder of decoded photos.
        test_dir: photos for central evaluation.
    """

    root: Path
    cache: Path
    test_dir: Path | None
    _classes: dict[str, tuple[ClassFolder, ...]] = field(default_factory=dict, repr=False)
    _open: OrderedDict[str, tuple[OpenedSetup, StorePhotos]] = field(default_factory=OrderedDict, repr=False)

    @property
    def has_test(self) -> bool:
        """See `Stores`."""
        return self.test_dir is not None

    def names(self) -> tuple[str, ...]:
        """See `Stores`."""
        return tuple(sorted(store_folders(self.root)))

    def classes(self, name: str) -> tuple[ClassFolder, ...]:
        """See `Stores`."""
        if name not in self._classes:
            found = scan(self._folder(name), val_fraction=0.0, seed=0)
            for finding in found.findings:
                logger.warning("%s: %s", name, finding)
            self._classes[name] = usable_classes(found)
        return self._classes[name]

    def num_photos(self, name: str, catalogue: Catalogue) -> int | None:
        """Return None: which photos are usable is known only once they are decoded."""
        return None

    def photos(self, name: str, opened: OpenedSetup) -> StorePhotos:
        """Return the store's photos, opened once per setup: a cache lookup takes as long as training on a few."""
        known = self._open.pop(name, None)
        if known is None or known[0] is not opened:
            known = opened, store_photos(self._folder(name), opened, PhotoCache(root=self.cache), store=name)
        self._open[name] = known
        if len(self._open) > MOST_OPEN:
            self._open.popitem(last=False)
        return known[1]

    def test(self, opened: OpenedSetup) -> PhotoSet:
        """See `Stores`."""
        if self.test_dir is None:
            raise DataError("there is no --test-dir to evaluate on")
        cache = PhotoCache(root=self.cache)
        return test_photos(self.test_dir, opened.config, opened.catalogue, cache, opened.bound_model)

    def _folder(self, name: str) -> Path:
        return self.root / to_filesystem(name)


class MemoryStores:
    """Photo sets in memory. Forked workers inherit them; other processes share one copy.

    Args:
        stores: training photos by store, with labels that index `class_names`.
        test: photos for central evaluation.
        class_names: class names by label.
    """

    def __init__(self, stores: Mapping[str, PhotoSet], test: PhotoSet | None, class_names: Iterable[str]) -> None:
        self._class_names = tuple(class_names)
        self._classes = tuple(ClassFolder(leaf=name, path=name) for name in self._class_names)
        self._stores = {name: stores[name] for name in sorted(stores)}
        self._test = test
        self._shared: dict[str, Any] | None = None
        self._features_of: OpenedSetup | None = None
        self._features: dict[str, PhotoSet] = {}

    @property
    def has_test(self) -> bool:
        """See `Stores`."""
        return self._test is not None

    def names(self) -> tuple[str, ...]:
        """See `Stores`."""
        return tuple(self._stores)

    def classes(self, name: str) -> tuple[ClassFolder, ...]:
        """See `Stores`."""
        return self._classes

    def num_photos(self, name: str, catalogue: Catalogue) -> int | None:
        """See `Stores`."""
        is_complete = self._class_names == catalogue.names or None not in map(catalogue.index_of, self._classes)
        return len(self._stores[name]) if is_complete else None

    def photos(self, name: str, opened: OpenedSetup) -> StorePhotos:
        """See `Stores`."""
        photos = self._stores[name]
        train = self._relabelled(photos, opened.catalogue)
        if len(photos) and not len(train):
            raise DataError("it holds no photo of a class in the run's catalogue")
        num_left_out = len(photos) - len(train)
        if opened.bound_model.head is not None:
            train = self._featurized(name, train, opened)
        return StorePhotos(train=train, validation=_none_of(train), num_left_out=num_left_out)

    def test(self, opened: OpenedSetup) -> PhotoSet:
        """See `Stores`."""
        if self._test is None:
            raise DataError("there are no test photos to evaluate on")
        photos = self._relabelled(self._test, opened.catalogue)
        return photos if opened.bound_model.head is None else featurized(opened.bound_model, photos, cache=None)

    def _featurized(self, name: str, photos: PhotoSet, opened: OpenedSetup) -> PhotoSet:
        """The features of a store's photos, computed once per setup and process."""
        if self._features_of is not opened:
            self._features_of, self._features = opened, {}
        if name not in self._features:
            views = opened.config.feature_views
            self._features[name] = featurized(opened.bound_model, photos, cache=None, views=views)
        return self._features[name]

    def _relabelled(self, photos: PhotoSet, catalogue: Catalogue) -> PhotoSet:
        """Map the caller's labels to the catalogue's, without photos of classes that it lacks."""
        if self._class_names == catalogue.names:
            return photos
        indices = [catalogue.index_of(folder) for folder in self._classes]
        labels = np.array([-1 if index is None else index for index in indices])[photos.labels]
        if (labels >= 0).all():  # the images need no copy
            return PhotoSet(photos.images, labels)
        return PhotoSet(photos.images[labels >= 0], labels[labels >= 0])

    def __getstate__(self) -> dict[str, Any]:
        """Return one copy for all processes. It is kept here, because they find it by its tensors' file descriptors."""
        if self._shared is None:
            # One pair of tensors for all stores: each shared tensor takes a file descriptor in every process.
            parts = [*self._stores.values(), *([self._test] if self._test is not None else [])]
            self._shared = {
                "class_names": self._class_names,
                "names": self.names(),
                "ends": np.cumsum([len(photos) for photos in parts]).tolist(),
                "images": torch.from_numpy(np.concatenate([photos.images for photos in parts])).share_memory_(),
                "labels": torch.from_numpy(np.concatenate([photos.labels for photos in parts])).share_memory_(),
            }
        return self._shared

    def __setstate__(self, state: dict[str, Any]) -> None:
        images, labels, ends = state["images"].numpy(), state["labels"].numpy(), state["ends"]
        parts = [PhotoSet(images[start:end], labels[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
        test = parts.pop() if len(parts) > len(state["names"]) else None
        self.__init__(dict(zip(state["names"], parts, strict=True)), test, state["class_names"])  # type: ignore[misc]


def _none_of(photos: PhotoSet) -> PhotoSet:
    return PhotoSet(photos.images[:0], photos.labels[:0])


def join_of(stores: Stores, name: str) -> Join:
    """Return the `Join` of a simulated client."""
    return Join(
        protocol=PROTOCOL_VERSION, version=__version__, client=name, classes=stores.classes(name)
    )  # fmt: skip
