"""Loads the photos that a run trains and tests with."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedshelf.app.setup import OpenedSetup
from fedshelf.app.store_sales import StoreSales
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import DataError
from fedshelf.core.text import some
from fedshelf.data.cache import PhotoCache, none_usable
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.dataset import LoadedPhotos, load_photos, warn_of_left_out
from fedshelf.data.folder import PhotoFolder, has_split, scan
from fedshelf.data.photo_dates import UNKNOWN, photo_dates, warn_of_undated
from fedshelf.data.photo_set import PhotoSet
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.features import featurized

FEATURES = "features"  # folder of the photo cache


@dataclass(frozen=True, kw_only=True, eq=False)
class StorePhotos:
    """A store's photos.

    Attributes:
        train: photos to train on.
        validation: photos to validate on.
        num_left_out: number of photos whose class is not in the catalogue.
        sales: the store's sales, if the run uses them.
    """

    train: PhotoSet
    validation: PhotoSet
    num_left_out: int = 0
    sales: StoreSales | None = None


_NONE = PhotoSet(np.empty((0, 1, 1, 3), np.uint8), np.empty(0, np.int64))
NO_PHOTOS = StorePhotos(train=_NONE, validation=_NONE)


def store_photos(folder: Path, opened: OpenedSetup, cache: PhotoCache, *, store: str) -> StorePhotos:
    """Load a store's photos through the cache and split them as configured.

    Args:
        folder: the store's folder.
        opened: the setup's objects.
        cache: the cache of decoded photos.
        store: the store's name, for warnings.

    Returns:
        The photos.

    Raises:
        DataError: no photo can be decoded, or none belongs to a class in the catalogue.
    """
    found = scan(folder, val_fraction=opened.config.val_fraction, seed=opened.config.seed)
    return load_store_photos(found, opened, cache, store=store)


def load_store_photos(found: PhotoFolder, opened: OpenedSetup, cache: PhotoCache, *, store: str) -> StorePhotos:
    """Load a store's photos through the cache.

    Args:
        found: the photos, split.
        opened: the setup's objects.
        cache: the cache of decoded photos.
        store: the store's name, for warnings.

    Returns:
        The photos.

    Raises:
        DataError: no photo can be decoded, or none belongs to a class in the catalogue.
    """
    config = opened.config
    train, validation = (
        load_photos(photos, opened.catalogue, cache, config.image_size, allow_empty=True)
        for photos in (found.train, found.validation)
    )
    left_out = Counter(train.left_out) + Counter(validation.left_out)
    warn_of_left_out(left_out, opened.catalogue, whose=store)
    problems = (*train.problems, *validation.problems)
    if not len(train.photo_set):
        raise DataError(
            none_usable(problems)
            if problems
            else "it holds no training photo of a class in the run's catalogue: its products are called "
            f"{some(train.left_out)}; give its folders the names that the other stores use"
        )
    bound, sets = opened.bound_model, [_with_teachers(loaded, opened, cache) for loaded in (train, validation)]
    if bound.head is not None:
        sets = [featurized(bound, s, cache=cache.root / FEATURES, views=config.feature_views) for s in sets]
    sales = None
    if bound.takes_sales:
        sales = StoreSales.of(found.root, opened.catalogue, train.photo_set.labels)
        days = [photo_dates(found.root, loaded.files) for loaded in (train, validation)]
        if sales.history is not None:
            warn_of_undated(np.concatenate(days), whose=store)
        sets = [sales.joined(photos, days_N) for photos, days_N in zip(sets, days, strict=True)]
    return StorePhotos(train=sets[0], validation=sets[1], num_left_out=left_out.total(), sales=sales)


def _with_teachers(loaded: LoadedPhotos, opened: OpenedSetup, cache: PhotoCache) -> PhotoSet:
    """The photos, with copies at the size of the run's teacher if it has another."""
    teacher, photos = opened.teacher, loaded.photo_set
    if teacher is None or teacher.image_size == opened.config.image_size:
        return photos
    larger = load_photos(loaded.files, opened.catalogue, cache, teacher.image_size, allow_empty=True)
    if len(larger.photo_set) != len(photos):
        raise DataError("a photo became unusable while the photos were opened. Try again")
    return replace(photos, teacher_images=larger.photo_set.images)


def scan_test_photos(folder: Path) -> PhotoFolder:
    """Scan the photos of a --test-dir.

    Raises:
        DataError: the folder cannot be read, is empty, or also contains training photos.
    """
    if has_split(folder):
        raise DataError(
            f"--test-dir '{folder}' has train/: give the folder of the test photos alone, such as its test/"
        )
    return scan(folder, val_fraction=0.0, seed=0)


def test_photos(
    folder: Path, config: RunConfig, catalogue: Catalogue, cache: PhotoCache, bound: BoundModel,
    store: str = "", sales: StoreSales | None = None,  # noqa: PT028
) -> PhotoSet:  # fmt: skip
    """Load test photos, without those whose class no client has; as features if the model takes these.

    With sales, they are those photos whose date at the store is known (see `data.photo_dates`), if there are any.

    Args:
        folder: the test folder.
        config: the run's configuration.
        catalogue: the classes.
        cache: the cache of decoded photos.
        bound: the model, with its frozen values loaded.
        store: the store that tests on them.
        sales: the store's sales; None: the photos are for the image model.

    Returns:
        The photos.

    Raises:
        DataError: no photo belongs to a class in the catalogue.
    """
    loaded = load_photos(scan_test_photos(folder).train, catalogue, cache, config.image_size, allow_empty=True)
    warn_of_left_out(Counter(loaded.left_out), catalogue, whose="--test-dir")
    if not len(loaded.photo_set):
        raise DataError(f"--test-dir {folder}: none of its photos is of a class that the clients hold")
    photos = loaded.photo_set
    if bound.head is not None:
        photos = featurized(bound, photos, cache=cache.root / FEATURES)
    if sales is None:
        return photos
    days = photo_dates(folder, loaded.files, store=store)
    photos, dated = sales.joined(photos, days), days != UNKNOWN
    return PhotoSet(photos.images[dated], photos.labels[dated]) if dated.any() else photos
