"""Finds the photos of products below a folder, and lists what is left out.

NAS devices, cameras and desktops keep their own folders among the photos; links may be broken; a folder may be
unreadable. None of that ends a scan or becomes a product: it is listed in `Listing.findings`.
"""

import functools
import importlib.util
import os
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from fedshelf.core.text import first_few, from_filesystem, some, to_filesystem
from fedshelf.data.filesystem import cause, reading

_EXTENSIONS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
_BY_LIBRARY = {"pillow_heif": frozenset((".heic", ".heif", ".hif")), "PIL._avif": frozenset((".avif",))}
ALL_EXTENSIONS = _EXTENSIONS.union(*_BY_LIBRARY.values())
"""Suffixes of photos, whether or not the library that decodes them is installed."""
_SYSTEM_FOLDERS = frozenset(
    (
        "@eadir", "@tmp", "@recycle", "@recently-snapshot", "@sharebin", "@__thumb", "#recycle", "#snapshot",
        "~snapshot", "$recycle.bin", "recycler", "recycled", "system volume information", "found.000", "lost+found",
        "__macosx", "network trash folder", "temporary items",
    )
)  # fmt: skip
PRIVATE_FOLDER = ".fedshelf"
"""Folder below a photo folder in which FedShelf keeps corrections that are not trained on, and their journal."""

PHOTO_DATES, SALES = "photos.csv", "sales.csv"
"""Tables next to the photos of a store: when they were taken, and what was sold (`photo_dates`, `sales`)."""

SYSTEM = "folders that a NAS or an operating system keeps for itself"
HIDDEN = "hidden folders"
LIKE_PHOTOS = "folders with a photo's name"
LINKS_UP = "links to a folder above them"
DEAD_LINKS = "links that lead nowhere, or back to themselves"
UNREADABLE = "folders that cannot be read"
HIDDEN_PHOTOS = "hidden photos"
STRAY = "photos outside of any product's folder"
EMPTY = "folders without a photo"


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Photo:
    """One photo file.

    Attributes:
        class_path: '/'-separated path of its folder below the data folder.
        path: the file.
    """

    class_path: str
    path: Path


@dataclass(kw_only=True, slots=True)
class Listing:
    """The content of a folder.

    Attributes:
        root: the folder.
        photos: photos in product folders, sorted by class path and name.
        stray: names of photos directly in `root`, which have no class.
        left_out: by kind, paths below `root` that were skipped.
        other_files: by suffix, the number of files that are not photos.
        folders: by class path, the names of its folders on disk.
    """

    root: Path
    photos: list[Photo] = field(default_factory=list)
    stray: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    other_files: Counter[str] = field(default_factory=Counter)
    folders: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def findings(self) -> list[str]:
        """What was left out, and which names are unusual, in sentences."""
        found = [
            f"left out: {kind} ({len(names)}): {some(sorted(names))}" for kind, names in sorted(self.left_out.items())
        ]
        if self.other_files:
            counts = [f"{count} {ending or 'without an ending'}" for ending, count in sorted(self.other_files.items())]
            found.append(f"left out: files that are not read as photos: {first_few(counts)}{self._heic()}")
        raw = [path for path, names in self.folders.items() if any(_is_raw(name) for name in names)]
        if raw:
            found.append(
                f"folder names that are not UTF-8 ({len(raw)}), taken as written here: {some(sorted(raw))}; rename "
                f"them, for instance with: convmv -r -f ENCODING -t UTF-8 --notest '{self.root}'"
            )
        found += [
            f"'{path}' is the name of several folders ({len(names)}), written with different Unicode characters, and "
            "taken as one product"
            for path, names in sorted(self.folders.items())
            if len(names) > 1
        ]
        return found

    def _heic(self) -> str:
        if _BY_LIBRARY["pillow_heif"].isdisjoint(self.other_files):
            return ""
        return " (HEIC photos are read where fedshelf[heic] is installed: pip install 'fedshelf[heic]')"


@functools.cache
def photo_extensions() -> frozenset[str]:
    """Suffixes of photos that this machine can decode."""
    found = (endings for library, endings in _BY_LIBRARY.items() if importlib.util.find_spec(library) is not None)
    return _EXTENSIONS.union(*found)


def is_photo_name(name: str) -> bool:
    """Whether a file of this name is considered a photo."""
    return not name.startswith(".") and _suffix(name) in photo_extensions()


def list_photos(root: Path) -> Listing:
    """Find all photos in product folders below `root`, at any depth.

    Links are followed, unless they lead to a parent folder.

    Raises:
        DataError: `root` cannot be read.
    """
    found = Listing(root=root)
    pending: list[tuple[Path, tuple[str, ...], frozenset[tuple[int, int]]]] = [(root, (), frozenset())]
    while pending:
        folder, parts, above = pending.pop()
        try:
            status = folder.stat()
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            if not parts:
                with reading(f"photo folder '{root}'"):
                    raise
            found.left_out[UNREADABLE].append(f"{'/'.join(parts)} ({cause(error)})")
            continue
        here = (status.st_dev, status.st_ino)
        if here in above:
            found.left_out[LINKS_UP].append("/".join(parts))
            continue
        if parts and not any(_is_folder(entry) or is_photo_name(entry.name) for entry in entries):
            found.left_out[EMPTY].append("/".join(parts))
        class_path, on_disk = unicodedata.normalize("NFC", "/".join(parts)), str(folder.relative_to(root))
        for entry in entries:
            name = from_filesystem(entry.name)
            is_folder = _is_folder(entry)
            kind = reason_to_skip(entry.name, is_folder=is_folder)
            if is_folder and entry.name == PRIVATE_FOLDER:
                continue
            if kind:
                found.left_out[kind].append("/".join((*parts, name)))
            elif is_folder:
                pending.append((folder / entry.name, (*parts, name), above | {here}))
            elif not is_photo_name(entry.name):
                if not name.startswith(".") and (parts or name not in (PHOTO_DATES, SALES)):
                    found.other_files[_suffix(name)] += 1
            elif not parts:
                found.stray.append(name)
            else:
                found.photos.append(Photo(class_path=class_path, path=folder / entry.name))
                found.folders[class_path].add(on_disk)
    if found.stray:
        found.left_out[STRAY] = found.stray
    found.photos.sort()
    return found


def photos_below(root: Path) -> list[Path]:
    """All photos below `root`, at any depth and in any folders, sorted.

    Raises:
        DataError: `root` cannot be read.
    """
    listing = list_photos(root)
    stray = [root / to_filesystem(name) for name in listing.stray]
    return sorted([*stray, *(photo.path for photo in listing.photos)])


def subfolders(root: Path) -> tuple[Path, ...]:
    """The folders directly in `root`, sorted, without hidden and system folders.

    Raises:
        DataError: `root` cannot be read.
    """
    with reading(f"folder '{root}'"), os.scandir(root) as listing:
        names = [e.name for e in listing if _is_folder(e) and not reason_to_skip(e.name, is_folder=True)]
    return tuple(root / name for name in sorted(names))


def _is_folder(entry: "os.DirEntry[str]") -> bool | None:
    """Whether an entry is a folder; None for a broken or circular link."""
    try:
        if entry.is_dir():
            return True
        return False if not entry.is_symlink() or entry.stat() else None
    except OSError:
        return None


def reason_to_skip(name: str, *, is_folder: bool | None) -> str:
    """The kind of an entry that is skipped by name; empty for any other."""
    if is_folder is None and not is_photo_name(name):  # an unreadable photo is reported as such
        return DEAD_LINKS
    if not is_folder:
        return HIDDEN_PHOTOS if name.startswith(".") and _suffix(name) in ALL_EXTENSIONS else ""
    if name.casefold() in _SYSTEM_FOLDERS:
        return SYSTEM
    if name.startswith("."):
        return HIDDEN
    return LIKE_PHOTOS if _suffix(name) in ALL_EXTENSIONS else ""


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def _is_raw(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return True
    return False
