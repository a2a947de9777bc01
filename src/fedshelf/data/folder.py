"""A store's photos as they lie on its disk.

The folder that directly holds a photo is the photo's class::

    root/Fruit/Apple/Pink-Lady/0001.jpg      class path 'Fruit/Apple/Pink-Lady', leaf 'Pink-Lady'

Where root holds `train/` (with class folders in it) and perhaps `val/`, these two are the split and class paths
start below them; `test/` beside them is left alone. Otherwise `split` takes the validation photos out of each class.
"""

import hashlib
import logging
import math
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedshelf.core.errors import DataError, UsageError
from fedshelf.core.messages import ClassFolder

PHOTO_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
_EXTENSIONS_TEXT = "jpg, jpeg, png, webp or bmp"
_SPLIT_FOLDERS = frozenset({"train", "val", "test"})

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Photo:
    """One photo file. `class_path` is the path of the folder that holds it, '/' between, below the data folder."""

    class_path: str
    path: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class PhotoFolder:
    """What a scan found, in sorted order; whether the files can be decoded is the cache's question."""

    root: Path
    train: tuple[Photo, ...]
    validation: tuple[Photo, ...]
    classes: tuple[ClassFolder, ...]


def scan(root: Path, *, val_fraction: float, seed: int) -> PhotoFolder:
    """Find all photos below `root` and split them.

    Args:
        root: a folder with one folder per class (nested as you like), or with `train/` and `val/` of that shape.
        val_fraction: share of each class that is kept for validation, in [0, 1); of no effect where root has
            a `val/` beside `train/`.
        seed: of the split; see `split`.

    Raises:
        DataError: root cannot be read, or holds no photo in any class folder.
        UsageError: `val_fraction` is not in [0, 1).
    """
    if not 0 <= val_fraction < 1:
        raise UsageError(f"--val-fraction is {val_fraction}: give a share of at least 0 and below 1, for instance 0.1")
    if not root.is_dir():
        state = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"photo folder '{root}' {state}: give the folder that holds one folder of photos per class")
    below = root
    if has_split(root):
        _warn_of_folders_beside_split(root)
        below = root / "train"
    if below != root and (root / "val").is_dir():
        train, validation = photos_below(below), photos_below(root / "val")
    else:
        train, validation = split(photos_below(below), root=below, val_fraction=val_fraction, seed=seed)
    if not train:
        raise DataError(_nothing_found(below))
    return PhotoFolder(root=root, train=train, validation=validation, classes=class_folders((*train, *validation)))


def has_split(root: Path) -> bool:
    """Whether `root/train` is the training part of a split, not a class named 'train' (which holds photos itself)."""
    train = root / "train"
    return train.is_dir() and any(entry.is_dir() and not entry.name.startswith(".") for entry in train.iterdir())


def photos_below(root: Path) -> tuple[Photo, ...]:
    """All photos in class folders below `root`, sorted by class path and name.

    Hidden files and folders are ignored, links followed (a link back to a folder above it is not). Photos directly
    in `root` have no class: they are left out with a warning.
    """
    photos: list[Photo] = []
    stray: list[str] = []
    for directory, names in _walk(root, frozenset()):
        parts = directory.relative_to(root).parts
        if not parts:
            stray = names
            continue
        class_path = "/".join(plain_text(part) for part in parts)
        photos += (Photo(class_path=class_path, path=directory / name) for name in names)
    if stray:
        _log.warning(
            "%d photos lie directly in '%s', for instance '%s': they have no class folder and are left out",
            len(stray), root, min(stray),
        )  # fmt: skip
    return tuple(sorted(photos))


def class_folders(photos: Sequence[Photo]) -> tuple[ClassFolder, ...]:
    """The classes of `photos`, each once, sorted by path."""
    return tuple(class_folder(path) for path in sorted({photo.class_path for photo in photos}))


def class_folder(class_path: str) -> ClassFolder:
    """The class with this '/'-separated path."""
    return ClassFolder(leaf=class_path.rsplit("/", 1)[-1], path=class_path)


def split(
    photos: Sequence[Photo], *, root: Path, val_fraction: float, seed: int
) -> tuple[tuple[Photo, ...], tuple[Photo, ...]]:
    """Split each class into training and validation photos.

    A photo's rank inside its class is a hash of the seed and of its path below `root`; the lowest ranks are kept
    for validation. So the split does not depend on the order or the number of files: a new photo moves at most one
    other photo of its class across. A class of n photos gives n · `val_fraction`, rounded up or down by a draw of its
    own (so that many small classes together give the fraction), but never its last training photo. A folder with
    any class of two photos gives at least one.

    Returns:
        Training and validation photos, each in the order of `photos`.
    """
    if val_fraction == 0:
        return tuple(photos), ()
    classes: dict[str, list[Photo]] = defaultdict(list)
    for photo in photos:
        classes[photo.class_path].append(photo)
    quota = {
        path: min(math.floor(len(members) * val_fraction + _unit_hash(seed, path)), len(members) - 1)
        for path, members in classes.items()
    }
    if not any(quota.values()):
        largest = max(classes, key=lambda path: (len(classes[path]), path), default=None)
        if largest is not None:
            quota[largest] = min(1, len(classes[largest]) - 1)
    chosen: set[Photo] = set()
    for path, members in classes.items():
        ranked = sorted(members, key=lambda photo: _unit_hash(seed, plain_text(str(photo.path.relative_to(root)))))
        chosen.update(ranked[: quota[path]])
    return tuple(p for p in photos if p not in chosen), tuple(p for p in photos if p in chosen)


def is_photo_name(name: str) -> bool:
    """Whether a file of this name is taken for a photo."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in PHOTO_EXTENSIONS  # noqa: PTH122


def plain_text(name: str) -> str:
    """A file system name as text that is the same on every system: composed (NFC), undecodable bytes replaced."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "replace"))


def _walk(directory: Path, above: frozenset[tuple[int, int]]) -> Iterator[tuple[Path, list[str]]]:
    """Yield each folder with its photo names. `above` are the (device, inode) pairs on the way here."""
    try:
        status = directory.stat()
        with os.scandir(directory) as listing:
            entries = [entry for entry in listing if not entry.name.startswith(".")]
    except OSError as error:
        if not above:
            raise DataError(f"photo folder '{directory}' cannot be read: {error.strerror}; check its rights") from error
        _log.warning("folder '%s' cannot be read (%s) and is left out", directory, error.strerror)
        return
    here = (status.st_dev, status.st_ino)
    if here in above:
        _log.warning("folder '%s' is a link to a folder above it and is left out", directory)
        return
    folders = sorted(entry.name for entry in entries if entry.is_dir())
    yield directory, sorted(entry.name for entry in entries if is_photo_name(entry.name) and not entry.is_dir())
    for name in folders:
        yield from _walk(directory / name, above | {here})


def _unit_hash(seed: int, text: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.blake2b(f"{seed}\x1f{text}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def _warn_of_folders_beside_split(root: Path) -> None:
    others = sorted(
        entry.name
        for entry in root.iterdir()
        if entry.is_dir() and entry.name not in _SPLIT_FOLDERS and not entry.name.startswith(".")
    )
    if others:
        _log.warning("'%s' has train/: its other folders are ignored (%s)", root, ", ".join(others[:5]))


def _nothing_found(root: Path) -> str:
    names = [entry.name for entry in root.iterdir() if is_photo_name(entry.name)]
    if names:
        why = f"its {len(names)} photos lie directly in it, so that their class is not known"
    else:
        why = f"no file below it has a name that ends in {_EXTENSIONS_TEXT}"
    return f"photo folder '{root}' has no photo in a class folder: {why}. Put photos at '{root}/CLASS/NAME.jpg'"
