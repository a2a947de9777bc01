"""Sources of the simulated clients' photos."""

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fedshelf import __version__
from fedshelf.app.photos import FEATURES, StorePhotos, store_photos, test_photos
from fedshelf.app.setup import OpenedSetup
from fedshelf.app.store_sales import StoreSales
from fedshelf.core.errors import DataError
from fedshelf.core.messages import PROTOCOL_VERSION, ClassFolder, Join
from fedshelf.data.cache import PhotoCache
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.dataset import warn_of_left_out
from fedshelf.data.folder import class_folder, held_out, scan
from fedshelf.data.health import usable_classes
from fedshelf.data.photo_set import PhotoSet
from fedshelf.training.features import featurized

logger = logging.getLogger(__name__)

MOST_OPEN = 4096  # maximum number of stores whose photo files a process keeps mapped


class Stores(Protocol):
    """The photos of many stores. Picklable: spawned workers get a copy."""

    @property
    def has_test(self) -> bool:
        """Whether there are photos for central evaluation."""
        ...

    @property
    def features_folder(self) -> Path | None:
        """The folder in which features of photos are kept; None if they are not."""
        ...

    def names(self) -> tuple[str, ...]:
        """Return the names of all stores, sorted."""
        ...

    def classes(self, name: str) -> tuple[ClassFolder, ...]:
        """Return the class folders of store `name`."""
        ...

    def num_photos(self, name: str, catalogue: Catalogue) -> tuple[int, int] | None:
        """Return the number of training and validation photos of `name`; None if they must be opened to know."""
        ...

    def photos(self, name: str, opened: OpenedSetup) -> StorePhotos:
        """Return the photos of store `name`, labeled for the setup."""
        ...

    def test(self, opened: OpenedSetup, store: str = "", sales: StoreSales | None = None) -> PhotoSet:
        """Return the photos for central evaluation; or with the sales of a store, for its own."""
        ...


@dataclass(frozen=True, kw_only=True)
class FolderStores:
    """One folder per store, decoded through the cache.

    Attributes:
        folders: the folder of each store.
        cache: the folder of decoded photos.
        test_dir: photos for central evaluation.
    """

    folders: Mapping[str, Path]
    cache: Path
    test_dir: Path | None
    _classes: dict[str, tuple[ClassFolder, ...]] = field(default_factory=dict, repr=False)
    _open: OrderedDict[str, tuple[OpenedSetup, StorePhotos]] = field(default_factory=OrderedDict, repr=False)

    @property
    def has_test(self) -> bool:
        """See `Stores`."""
        return self.test_dir is not None

    @property
    def features_folder(self) -> Path:
        """See `Stores`."""
        return self.cache / FEATURES

    def names(self) -> tuple[str, ...]:
        """See `Stores`."""
        return tuple(sorted(self.folders))

    def classes(self, name: str) -> tuple[ClassFolder, ...]:
        """See `Stores`."""
        if name not in self._classes:
            found = scan(self.folders[name], val_fraction=0.0, seed=0)
            for finding in found.findings:
                logger.warning("%s: %s", name, finding)
            self._classes[name] = usable_classes(found)
        return self._classes[name]

    def num_photos(self, name: str, catalogue: Catalogue) -> tuple[int, int] | None:
        """Return None: which photos are usable is known only once they are decoded."""
        return None

    def photos(self, name: str, opened: OpenedSetup) -> StorePhotos:
        """Return the store's photos, opened once per setup: a cache lookup takes as long as training on a few."""
        known = self._open.pop(name, None)
        if known is None or known[0] is not opened:
            known = opened, store_photos(self.folders[name], opened, PhotoCache(root=self.cache), store=name)
        self._open[name] = known
        if len(self._open) > MOST_OPEN:
            self._open.popitem(last=False)
        return known[1]

    def test(self, opened: OpenedSetup, store: str = "", sales: StoreSales | None = None) -> PhotoSet:
        """See `Stores`."""
        if self.test_dir is None:
            raise DataError("there is no --test-dir to evaluate on")
        cache = PhotoCache(root=self.cache)
        return test_photos(
            self.test_dir, opened.config, opened.catalogue, cache, opened.bound_model, store=store, sales=sales
        )  # fmt: skip


class MemoryStores:
    """Photo sets in memory. Forked workers inherit them; other processes share one copy.

    Args:
        stores: photos by store, with labels that index `class_names`.
        test: photos for central evaluation.
        class_names: class names by label; folder paths ('Fruit/Apple') work, too.
        val_fraction: share of a store's photos held out for validation. Which ones depends on their positions.
        seed: seed of that split.
    """

    def __init__(
        self, stores: Mapping[str, PhotoSet], test: PhotoSet | None, class_names: Iterable[str], *,
        val_fraction: float = 0.0, seed: int = 0,
    ) -> None:  # fmt: skip
        self._class_names = tuple(class_names)
        self._classes = tuple(map(class_folder, self._class_names))
        self._train: dict[str, PhotoSet] = {}
        self._validation: dict[str, PhotoSet] = {}
        for name in sorted(stores):
            self._train[name], self._validation[name] = self._split(stores[name], val_fraction, seed)
        self._test = test
        self._shared: dict[str, Any] | None = None
        self._features_of: OpenedSetup | None = None
        self._features: dict[tuple[str, bool], PhotoSet] = {}

    @property
    def has_test(self) -> bool:
        """See `Stores`."""
        return self._test is not None

    @property
    def features_folder(self) -> None:
        """See `Stores`."""
        return None

    def names(self) -> tuple[str, ...]:
        """See `Stores`."""
        return tuple(self._train)

    def classes(self, name: str) -> tuple[ClassFolder, ...]:
        """See `Stores`."""
        return self._classes

    def num_photos(self, name: str, catalogue: Catalogue) -> tuple[int, int] | None:
        """See `Stores`."""
        is_complete = self._class_names == catalogue.names or None not in map(catalogue.index_of, self._classes)
        return (len(self._train[name]), len(self._validation[name])) if is_complete else None

    def photos(self, name: str, opened: OpenedSetup) -> StorePhotos:
        """See `Stores`."""
        given = self._train[name], self._validation[name]
        train, validation = (self._relabelled(photos, opened.catalogue) for photos in given)
        if len(given[0]) and not len(train):
            raise DataError("it holds no training photo of a class in the run's catalogue")
        num_left_out = sum(map(len, given)) - len(train) - len(validation)
        if opened.bound_model.head is not None:
            train = self._featurized((name, True), train, opened)
            validation = self._featurized((name, False), validation, opened)
        return StorePhotos(train=train, validation=validation, num_left_out=num_left_out)

    def test(self, opened: OpenedSetup, store: str = "", sales: StoreSales | None = None) -> PhotoSet:
        """See `Stores`."""
        if self._test is None:
            raise DataError("there are no test photos to evaluate on")
        known = self._relabelled(self._test, opened.catalogue)
        if len(known) < len(self._test):
            unknown = [opened.catalogue.index_of(folder) is None for folder in self._classes]
            left_out = Counter(self._class_names[label] for label in self._test.labels if unknown[label])
            warn_of_left_out(left_out, opened.catalogue, whose="the test photos")
        if not len(known):
            raise DataError("none of the test photos is of a class that the clients hold")
        return known if opened.bound_model.head is None else featurized(opened.bound_model, known, cache=None)

    def _split(self, photos: PhotoSet, val_fraction: float, seed: int) -> tuple[PhotoSet, PhotoSet]:
        classes = [self._class_names[label] for label in photos.labels]
        keys = [f"{path}/{index}" for index, path in enumerate(classes)]
        chosen = held_out(classes, keys, val_fraction=val_fraction, seed=seed)
        if not chosen:
            return photos, _none_of(photos)
        is_held_out = np.isin(np.arange(len(photos)), list(chosen))
        train, validation = (PhotoSet(photos.images[part], photos.labels[part]) for part in (~is_held_out, is_held_out))
        return train, validation

    def _featurized(self, name: tuple[str, bool], photos: PhotoSet, opened: OpenedSetup) -> PhotoSet:
        """The features of a store's training or validation photos, computed once per setup and process."""
        if self._features_of is not opened:
            self._features_of, self._features = opened, {}
        if name not in self._features:
            views = opened.config.feature_views
            found = featurized(opened.bound_model, photos, cache=None, views=views)
            if opened.bound_model.takes_sales:
                found = StoreSales.none(len(opened.catalogue)).joined(found, np.zeros(len(found), np.int64))
            self._features[name] = found
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
            parts = [*self._train.values(), *self._validation.values(), *([] if self._test is None else [self._test])]
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
        count = len(state["names"])
        test = parts[2 * count] if len(parts) > 2 * count else None
        train, validation = (dict(zip(state["names"], some, strict=False)) for some in (parts, parts[count:]))
        self.__init__(train, test, state["class_names"])  # type: ignore[misc]
        self._validation = validation


def _none_of(photos: PhotoSet) -> PhotoSet:
    return PhotoSet(photos.images[:0], photos.labels[:0])


def join_of(stores: Stores, name: str) -> Join:
    """Return the `Join` of a simulated client."""
    return Join(
        protocol=PROTOCOL_VERSION, version=__version__, client=name, classes=stores.classes(name)
    )  # fmt: skip
