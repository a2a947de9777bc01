"""Loading photos from files into arrays.

Shapes: S the image size.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedshelf.core.errors import DataError
from fedshelf.core.text import counted, first_few, some
from fedshelf.data.cache import PhotoCache, Problem, Progress, UnreadableFileError, read_photo
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.class_names import similar_names
from fedshelf.data.decode import UnusablePhotoError, decode
from fedshelf.data.folder import class_folder
from fedshelf.data.photo_files import Photo
from fedshelf.data.photo_set import PhotoSet

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoadedPhotos:
    """A photo set, and what was left out of it.

    Attributes:
        photo_set: the photos.
        files: the file of each.
        left_out: by class path, the number of photos of classes missing from the catalogue.
        problems: photos that cannot be used.
    """

    photo_set: PhotoSet
    files: tuple[Photo, ...]
    left_out: Mapping[str, int]
    problems: tuple[Problem, ...]


def load_photos(
    photos: Sequence[Photo],
    catalogue: Catalogue,
    cache: PhotoCache,
    image_size: int,
    *,
    allow_empty: bool = False,
    progress: Progress = lambda done, total: None,
) -> LoadedPhotos:
    """Decode the photos of classes in the catalogue, or find them in the cache, in the order of `photos`.

    Photos of other classes (see `warn_of_left_out`) and unusable ones, which are logged, are left out.

    Args:
        photos: the photos to load. If all are of classes missing from the catalogue, the set is empty.
        catalogue: gives class paths their index.
        cache: stores decoded photos.
        image_size: S, in pixels.
        allow_empty: do not raise if no photo is usable (for validation photos).
        progress: called with the number of photos decoded and the total.

    Raises:
        DataError: no photo is usable, or the cache cannot be written.
    """
    known, left_out = _with_labels(photos, catalogue)
    cached = cache.open([photo for photo, _ in known], image_size, allow_empty=allow_empty, progress=progress)
    labels = np.array([known[i][1] for i in cached.kept], dtype=np.int64)
    return LoadedPhotos(
        photo_set=PhotoSet(cached.images, labels), files=tuple(known[i][0] for i in cached.kept),
        left_out=dict(sorted(left_out.items())), problems=cached.problems,
    )  # fmt: skip


def load_known(
    photos: Sequence[Photo], catalogue: Catalogue, cache: PhotoCache, image_size: int, *, whose: str
) -> LoadedPhotos:
    """Load the photos of products that a finished model knows, and warn of the others; see `load_photos`.

    Args:
        photos: the photos.
        catalogue: the model's products.
        cache: stores decoded photos.
        image_size: S, in pixels.
        whose: the folder that holds them.

    Raises:
        DataError: there is none.
    """
    loaded = load_photos(photos, catalogue, cache, image_size, allow_empty=True)
    warn_of_left_out(Counter(loaded.left_out), catalogue, whose=whose)
    if not len(loaded.photo_set):
        raise DataError(
            f"'{whose}' holds no usable photos of products that the model knows: it needs one folder of photos per "
            f"product, named as the model's labels are ({', '.join(catalogue.names[:3])}, …)"
        )
    return loaded


def warn_of_left_out(left_out: Counter[str], catalogue: Catalogue, *, whose: str) -> None:
    """Log which photos are left out because their classes are not in the catalogue.

    Args:
        left_out: number of photos by class path.
        catalogue: the classes.
        whose: the store that holds them, or a folder.
    """
    if left_out:
        listed = (
            f"{path} ({count}{_similar_in_catalogue(path, catalogue)})" for path, count in sorted(left_out.items())
        )
        number = counted(left_out.total(), "photo")
        logger.warning("%s: left out: %s of classes that are not in the catalogue: %s", whose, number,
            first_few(listed))  # fmt: skip


def _with_labels(photos: Sequence[Photo], catalogue: Catalogue) -> tuple[list[tuple[Photo, int]], Counter[str]]:
    """The photos of classes in the catalogue with their class index.

    Returns:
        The photos, and the number of photos of each other class path.
    """
    index_of = {path: catalogue.index_of(class_folder(path)) for path in {photo.class_path for photo in photos}}
    known: list[tuple[Photo, int]] = []
    left_out: Counter[str] = Counter()
    for photo in photos:
        index = index_of[photo.class_path]
        if index is None:
            left_out[photo.class_path] += 1
        else:
            known.append((photo, index))
    return known, left_out


def _similar_in_catalogue(class_path: str, catalogue: Catalogue) -> str:
    leaf = class_folder(class_path).leaf
    alike = [group for group in similar_names([leaf, *catalogue.names]) if leaf in group]
    return f"; the catalogue has {some(name for name in alike[0] if name != leaf)}" if alike else ""


def load_photo(path: Path, image_size: int) -> NDArray[np.uint8]:
    """Decode one photo [S, S, 3] as for training, without the cache.

    Raises:
        DataError: the file cannot be read, or is not a photo.
    """
    try:
        return decode(read_photo(path), image_size)
    except (UnreadableFileError, UnusablePhotoError) as error:
        raise DataError(f"photo '{path}' cannot be used: {error}") from None
