"""A store's photos on disk.

The folder that directly holds a photo is the photo's class::

    root/Fruit/Apple/Pink-Lady/0001.jpg      class path 'Fruit/Apple/Pink-Lady', leaf 'Pink-Lady'

If root holds `train/` (with class folders) and optionally `val/`, these two are the split, and class paths start below
them; a `test/` next to them is ignored. Otherwise, `split` takes the validation photos from each class.
"""

import hashlib
import math
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedshelf.core.class_folder import ClassFolder
from fedshelf.core.errors import DataError, UsageError
from fedshelf.core.text import counted, from_filesystem, some
from fedshelf.data import layout
from fedshelf.data.filesystem import folder_problem
from fedshelf.data.photo_files import Listing, Photo, list_photos, photo_extensions, subfolders

_SPLIT_FOLDERS = frozenset({"train", "val", "test"})


@dataclass(frozen=True, kw_only=True, slots=True)
class PhotoFolder:
    """The result of a scan, sorted. Whether files can be decoded is checked later, by the cache.

    Attributes:
        root: the folder.
        train: photos to train on.
        validation: photos held out.
        classes: the classes of all these photos.
        findings: what was left out, and signs that this is not the intended folder.
        has_split: whether the folder itself says what is held out, by `train/` and `val/`.
    """

    root: Path
    train: tuple[Photo, ...]
    validation: tuple[Photo, ...]
    classes: tuple[ClassFolder, ...]
    findings: tuple[str, ...] = ()
    has_split: bool = False


def scan(root: Path, *, val_fraction: float, seed: int) -> PhotoFolder:
    """Find all photos below `root` and split them.

    Args:
        root: a folder with one folder per class (with any nesting), or with `train/` and `val/` of that shape.
        val_fraction: share of each class held out for validation, in [0, 1); ignored if root has `train/` and
            `val/`.
        seed: seed of the split; see `split`.

    Raises:
        DataError: root cannot be read, holds no photo in any class folder, or is certainly not the intended folder (see
            `layout`).
        UsageError: `val_fraction` is not in [0, 1).
    """
    if not 0 <= val_fraction < 1:
        raise UsageError(f"--val-fraction is {val_fraction}: give a share of at least 0 and below 1, for instance 0.1")
    if problem := folder_problem(root):
        raise DataError(f"photo folder '{root}': {problem}; give the folder that holds one folder of photos per class")
    below, findings = root, []
    if has_split(root):
        findings += _folders_beside_split(root)
        below = root / "train"
    listing = list_photos(below)
    findings += [*listing.findings(), *layout.doubts(listing)]
    split_by_folder = below != root and not folder_problem(root / "val")
    if split_by_folder:
        held_out = list_photos(root / "val")
        findings += held_out.findings()
        train, validation = tuple(listing.photos), tuple(held_out.photos)
    else:
        train, validation = split(listing.photos, root=below, val_fraction=val_fraction, seed=seed)
    if not train:
        raise DataError(_nothing_found(listing))
    return PhotoFolder(
        root=root, train=train, validation=validation, classes=class_folders((*train, *validation)),
        findings=tuple(findings), has_split=split_by_folder,
    )  # fmt: skip


def has_split(root: Path) -> bool:
    """Whether `root/train` is the training part of a split.

    It is not if it holds photos itself, and so is a class named 'train'.

    Raises:
        DataError: it cannot be read.
    """
    return not folder_problem(root / "train") and bool(subfolders(root / "train"))


def class_folders(photos: Sequence[Photo]) -> tuple[ClassFolder, ...]:
    """The distinct classes of `photos`, sorted by path."""
    return tuple(class_folder(path) for path in sorted({photo.class_path for photo in photos}))


def class_folder(class_path: str) -> ClassFolder:
    """The class with this '/'-separated path."""
    return ClassFolder(leaf=class_path.rsplit("/", 1)[-1], path=class_path)


def split(
    photos: Sequence[Photo], *, root: Path, val_fraction: float, seed: int
) -> tuple[tuple[Photo, ...], tuple[Photo, ...]]:
    """Split each class into training and validation photos.

    A photo's rank in its class is a hash of the seed and of its path below `root`; the lowest ranks are held out. The
    split therefore does not depend on the order or number of files: a new photo moves at most one other photo of its
    class. A class of n photos gives n · `val_fraction`, rounded up or down at random per class (so that many small
    classes together give the fraction), but never its last training photo. A folder with any class of two photos gives
    at least one.

    Args:
        photos: all photos.
        root: the data folder.
        val_fraction: share of each class to hold out.
        seed: seed of the split.

    Returns:
        Training and validation photos, each in the order of `photos`.
    """
    chosen = held_out(
        [photo.class_path for photo in photos], [_split_key(photo, root) for photo in photos],
        val_fraction=val_fraction, seed=seed,
    )  # fmt: skip
    return (
        tuple(photo for index, photo in enumerate(photos) if index not in chosen),
        tuple(photo for index, photo in enumerate(photos) if index in chosen),
    )


def held_out(classes_N: Sequence[str], keys_N: Sequence[str], *, val_fraction: float, seed: int) -> frozenset[int]:
    """Choose the validation photos; see `split`.

    Args:
        classes_N: the class of each photo.
        keys_N: what identifies each photo in its store.
        val_fraction: share of each class to hold out.
        seed: seed of the split.

    Returns:
        Their indices.
    """
    if val_fraction == 0:
        return frozenset()
    classes: dict[str, list[int]] = defaultdict(list)
    for index, path in enumerate(classes_N):
        classes[path].append(index)
    quota = {
        path: min(math.floor(len(members) * val_fraction + _unit_hash(seed, path)), len(members) - 1)
        for path, members in classes.items()
    }
    if not any(quota.values()):
        largest = max(classes, key=lambda path: (len(classes[path]), path), default=None)
        if largest is not None:
            quota[largest] = min(1, len(classes[largest]) - 1)
    chosen: set[int] = set()
    for path, members in classes.items():
        ranked = sorted(members, key=lambda index: _unit_hash(seed, keys_N[index]))
        chosen.update(ranked[: quota[path]])
    return frozenset(chosen)


def _unit_hash(seed: int, text: str) -> float:
    """A number in [0, 1) that depends only on its arguments."""
    digest = hashlib.blake2b(f"{seed}\x1f{text}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def _split_key(photo: Photo, root: Path) -> str:
    return unicodedata.normalize("NFC", from_filesystem(str(photo.path.relative_to(root))))


def _folders_beside_split(root: Path) -> list[str]:
    others = [path.name for path in subfolders(root) if path.name not in _SPLIT_FOLDERS]
    return [f"'{root}' has train/: its other folders are left out: {some(others)}"] if others else []


def _nothing_found(listing: Listing) -> str:
    root = listing.root
    if listing.stray:
        why = f"{counted(len(listing.stray), 'photo')} directly in it, whose class is not known"
    else:
        why = f"no file below it has a name that ends in {', '.join(sorted(photo_extensions()))}"
    more = "".join(f". {finding[:1].upper()}{finding[1:]}" for finding in listing.findings())
    return f"photo folder '{root}' has no photo in a class folder: {why}. Put photos at '{root}/CLASS/NAME.jpg'{more}"
