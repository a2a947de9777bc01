"""`fedshelf data check`: checks a folder of photos before training."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedshelf.core.class_folder import ClassFolder
from fedshelf.core.errors import DataError
from fedshelf.core.text import counted, from_filesystem, some
from fedshelf.data.cache import Progress, UnreadableFileError, read_photo
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.decode import UnusablePhotoError, decode, photo_size
from fedshelf.data.folder import PhotoFolder, scan
from fedshelf.data.photo_dates import UNKNOWN, photo_dates
from fedshelf.data.photo_files import PHOTO_DATES, SALES, Photo
from fedshelf.data.sales import read_sales

TINY_PIXELS = 32  # of the shorter side: below the smallest image size that trains well
IMBALANCE = 10.0
_PROBE_SIZE = 32
_THREADS = 4
_NO_PHOTO = "there is no photo to train on: a client with this folder cannot take part"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassHealth:
    """The photos of one class.

    Attributes:
        path: the class path.
        train: usable training photos.
        validation: usable validation photos.
        unusable: photos that cannot be decoded.
        tiny: photos with few pixels.
    """

    path: str
    train: int
    validation: int
    unusable: int
    tiny: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Duplicate:
    """Files with identical bytes.

    Attributes:
        files: their paths.
        classes: their classes; more than one if they contradict each other.
        leaks: whether training and validation share them, which makes validation look too good.
    """

    files: tuple[str, ...]
    classes: tuple[str, ...]
    leaks: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """The report.

    Attributes:
        root: the folder.
        classes: the photos of each class.
        unusable: by path below `root`, why a photo is unusable.
        tiny: paths of photos with few pixels.
        duplicates: identical files.
        findings: problems that need attention, in sentences.
    """

    root: str
    classes: tuple[ClassHealth, ...]
    unusable: Mapping[str, str]
    tiny: tuple[str, ...]
    duplicates: tuple[Duplicate, ...]
    findings: tuple[str, ...]

    @property
    def num_train(self) -> int:
        """Number of usable training photos."""
        return sum(entry.train for entry in self.classes)

    @property
    def num_validation(self) -> int:
        """Number of usable validation photos."""
        return sum(entry.validation for entry in self.classes)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self) | {"num_train": self.num_train, "num_validation": self.num_validation}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Inspected:
    """One inspected photo.

    Attributes:
        digest: digest of its bytes; None if they cannot be read.
        reason: why it is unusable; empty if it is usable.
        tiny: whether it has few pixels.
    """

    digest: bytes | None = None
    reason: str = ""
    tiny: bool = False


def check(
    root: Path,
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    fewest: int = 10,
    progress: Progress = lambda done, total: None,
) -> Health:
    """Decode every photo below `root` and report, per class and overall.

    Args:
        root: see `folder.scan`.
        val_fraction: see `folder.scan`.
        seed: see `folder.scan`.
        fewest: classes with fewer usable training photos are reported.
        progress: called with the number of photos inspected and the total.

    Raises:
        DataError: no class folder holds a photo, or `root` is certainly not the intended folder.
    """
    folder = scan(root, val_fraction=val_fraction, seed=seed)
    photos = (*folder.train, *folder.validation)
    inspected: list[_Inspected] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for result in pool.map(_inspect, photos):
            inspected.append(result)
            progress(len(inspected), len(photos))
    names = [from_filesystem(photo.path.relative_to(root).as_posix()) for photo in photos]
    by_photo = dict(zip(photos, inspected, strict=True))
    classes = _classes(folder, by_photo)
    duplicates = _duplicates(folder, by_photo, dict(zip(photos, names, strict=True)))
    return Health(
        root=from_filesystem(str(root)),
        classes=classes,
        unusable={name: found.reason for name, found in zip(names, inspected, strict=True) if found.reason},
        tiny=tuple(name for name, found in zip(names, inspected, strict=True) if found.tiny),
        duplicates=duplicates,
        findings=(*folder.findings, *_findings(classes, duplicates, fewest), *_sales_findings(folder, photos)),
    )


def _sales_findings(folder: PhotoFolder, photos: Sequence[Photo]) -> list[str]:
    """Problems of the tables of sales and dates, if there are any."""
    tables = [name for name in (SALES, PHOTO_DATES) if (folder.root / name).exists()]
    try:
        undated = int((photo_dates(folder.root, photos) == UNKNOWN).sum()) if tables else 0
        if SALES not in tables:
            return []
        sales = read_sales(folder.root / SALES, Catalogue.resolve({"": folder.classes}))
    except DataError as error:
        return [str(problem) for problem in error.args]
    found = []
    if sales is None:
        found.append(f"{SALES} has no units of any product in this folder: give products the names of their folders")
    elif sales.num_ignored:
        found.append(f"{SALES}: {counted(sales.num_ignored, 'row')} of products that this folder does not have")
    if undated:
        found.append(f"no date is known for {undated:,} of {counted(len(photos), 'photo')}: these are without sales")
    return found


def usable_classes(folder: PhotoFolder) -> tuple[ClassFolder, ...]:
    """Return the classes that have a usable photo, in the order of `folder.classes`.

    Photos are decoded until one is usable: in most folders, one for each class.

    Args:
        folder: a store's photos.

    Raises:
        DataError: there is no usable training photo.
    """

    def with_usable(photos: Iterable[Photo]) -> set[str]:
        by_class: dict[str, list[Photo]] = defaultdict(list)
        for photo in photos:
            by_class[photo.class_path].append(photo)
        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(lambda photos: any(not _inspect(photo).reason for photo in photos), by_class.values())
            return {path for path, is_usable in zip(by_class, found, strict=True) if is_usable}

    usable = with_usable(folder.train)
    if not usable:
        number = counted(len(folder.train), "training photo")
        raise DataError(
            f"photo folder '{folder.root}': {_NO_PHOTO}. None of its {number} can be decoded; 'fedshelf data check' "
            "says why"
        )
    usable |= with_usable(photo for photo in folder.validation if photo.class_path not in usable)
    return tuple(entry for entry in folder.classes if entry.path in usable)


def _inspect(photo: Photo) -> _Inspected:
    try:
        data = read_photo(photo.path)
    except UnreadableFileError as error:
        return _Inspected(reason=str(error))
    digest = hashlib.sha256(data).digest()
    try:
        decode(data, _PROBE_SIZE)
        return _Inspected(digest=digest, tiny=min(photo_size(data)) < TINY_PIXELS)
    except UnusablePhotoError as error:
        return _Inspected(digest=digest, reason=str(error))


def _classes(folder: PhotoFolder, inspected: Mapping[Photo, _Inspected]) -> tuple[ClassHealth, ...]:
    def count(photos: tuple[Photo, ...], *, usable: bool) -> Counter[str]:
        return Counter(photo.class_path for photo in photos if usable is not bool(inspected[photo].reason))

    train, validation = count(folder.train, usable=True), count(folder.validation, usable=True)
    unusable = count((*folder.train, *folder.validation), usable=False)
    tiny = Counter(photo.class_path for photo, found in inspected.items() if found.tiny)
    return tuple(
        ClassHealth(
            path=entry.path, train=train[entry.path], validation=validation[entry.path],
            unusable=unusable[entry.path], tiny=tiny[entry.path],
        )
        for entry in folder.classes
    )  # fmt: skip


def _duplicates(
    folder: PhotoFolder, inspected: Mapping[Photo, _Inspected], names: Mapping[Photo, str]
) -> tuple[Duplicate, ...]:
    groups: dict[bytes, list[Photo]] = defaultdict(list)
    for photo, found in inspected.items():
        if found.digest is not None and not found.reason:
            groups[found.digest].append(photo)
    validation = set(folder.validation)
    duplicates = [
        Duplicate(
            files=tuple(sorted(names[photo] for photo in group)),
            classes=tuple(sorted({photo.class_path for photo in group})),
            leaks=len({photo in validation for photo in group}) > 1,
        )
        for group in groups.values()
        if len(group) > 1
    ]
    return tuple(sorted(duplicates, key=lambda duplicate: duplicate.files))


def _findings(classes: tuple[ClassHealth, ...], duplicates: tuple[Duplicate, ...], fewest: int) -> list[str]:
    findings = []
    if unusable := sum(entry.unusable for entry in classes):
        findings.append(f"{counted(unusable, 'photo')} cannot be used and will be left out of training")
    if not any(entry.train for entry in classes):
        findings.append(_NO_PHOTO)
    elif empty := [entry.path for entry in classes if entry.train == 0]:
        findings.append(f"no usable training photo in {counted(len(empty), 'class', 'classes')}: {some(empty)}")
    if few := [entry.path for entry in classes if 0 < entry.train < fewest]:
        classes_with_few = counted(len(few), "class", "classes")
        findings.append(f"fewer than {counted(fewest, 'training photo')} in {classes_with_few}: {some(few)}")
    sizes = [entry.train for entry in classes if entry.train]
    if sizes and max(sizes) / min(sizes) > IMBALANCE:
        findings.append(f"the largest class has {max(sizes) / min(sizes):.0f} times the photos of the smallest")
    if len(sizes) == 1:
        findings.append("there is only one class with photos: a store alone cannot learn to tell products apart")
    if tiny := sum(entry.tiny for entry in classes):
        findings.append(f"smaller than {TINY_PIXELS} pixels on a side: {counted(tiny, 'photo')}")
    if across := [duplicate for duplicate in duplicates if len(duplicate.classes) > 1]:
        findings.append(f"in several classes, so that one of the labels is wrong: {counted(len(across), 'photo')}")
    if same := sum(len(d.files) - 1 for d in duplicates if len(d.classes) == 1):
        findings.append(f"exact copies of others in their class: {counted(same, 'photo')}")
    if leaks := sum(duplicate.leaks for duplicate in duplicates):
        findings.append(
            f"both in training and in validation, which then looks better than it is: {counted(leaks, 'photo')}"
        )
    return findings
