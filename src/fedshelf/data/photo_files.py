"""Which files below a folder are photos of products, and what is left out, by name.

A NAS, a camera and a desktop keep folders of their own among the photos; links may lead nowhere; a folder may not be
readable. None of that ends a scan, and none of it becomes a product: it is listed in `Listing.findings`.
"""

import functools
import importlib.util
import os
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from fedshelf.core.text import from_filesystem, some
from fedshelf.data.filesystem import cause, reading

_EXTENSIONS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
_BY_LIBRARY = {"pillow_heif": frozenset((".heic", ".heif", ".hif")), "PIL._avif": frozenset((".avif",))}
ALL_EXTENSIONS = _EXTENSIONS.union(*_BY_LIBRARY.values())
"""How the names of photos end, whether or not this machine has the library that decodes them."""
_SYSTEM_FOLDERS = frozenset(
    (
        "@eadir", "@tmp", "@recycle", "@recently-snapshot", "@sharebin", "@__thumb", "#recycle", "#snapshot",
        "~snapshot", "$recycle.bin", "recycler", "recycled", "system volume information", "found.000", "lost+found",
        "__macosx", "network trash folder", "temporary items",
    )
)  # fmt: skip

SYSTEM = "folders that a NAS or an operating system keeps for itself"
HIDDEN = "hidden folders"
LIKE_PHOTOS = "folders with a photo's name"
LINKS_UP = "links to a folder above them"
DEAD_LINKS = "links that lead nowhere, or back to themselves"
UNREADABLE = "folders that cannot be read"
HIDDEN_PHOTOS = "hidden photos"
STRAY = "photos outside of any product's folder"


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Photo:
    """One photo file.

    Attributes:
        class_path: path of the folder that holds it, '/' between, below the data folder.
        path: the file.
    """

    class_path: str
    path: Path


@dataclass(kw_only=True, slots=True)
class Listing:
    """What lies below a folder.

    Attributes:
        root: the folder.
        photos: those in product folders, sorted by class path and name.
        stray: names of photos directly in `root`: they have no class.
        left_out: paths below `root` of what was passed over, by the kind of thing that it is.
        other_files: how many files are no photos, by the ending of their names.
        folders: names of the folders on disk by the class path that they became.
    """

    root: Path
    photos: list[Photo] = field(default_factory=list)
    stray: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    other_files: Counter[str] = field(default_factory=Counter)
    folders: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def findings(self) -> list[str]:
        """In sentences, what was left out, and which names are odd."""
        found = [
            f"left out: {kind} ({len(names)}): {some(sorted(names))}" for kind, names in sorted(self.left_out.items())
        ]
        if self.other_files:
            counts = [f"{count} {ending or 'without an ending'}" for ending, count in sorted(self.other_files.items())]
            found.append(f"left out: files that are not read as photos: {', '.join(counts)}{self._heic()}")
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
    """How the names of photos end that this machine can decode."""
    found = (endings for library, endings in _BY_LIBRARY.items() if importlib.util.find_spec(library) is not None)
    return _EXTENSIONS.union(*found)


def is_photo_name(name: str) -> bool:
    """Whether a file of this name is taken for a photo."""
    return not name.startswith(".") and _suffix(name) in photo_extensions()


def list_photos(root: Path) -> Listing:
    """All photos in product folders below `root`, however deep. Links are followed, but not back to a folder above.

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
        class_path, on_disk = unicodedata.normalize("NFC", "/".join(parts)), str(folder.relative_to(root))
        for entry in entries:
            name = from_filesystem(entry.name)
            is_folder = _is_folder(entry)
            kind = _reason_to_skip(entry.name, is_folder=is_folder)
            if kind:
                found.left_out[kind].append("/".join((*parts, name)))
            elif is_folder:
                pending.append((folder / entry.name, (*parts, name), above | {here}))
            elif not is_photo_name(entry.name):
                if not name.startswith("."):
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


def subfolders(root: Path) -> tuple[Path, ...]:
    """The folders directly in `root`, sorted, without hidden ones and those that a system keeps for itself.

    Raises:
        DataError: `root` cannot be read.
    """
    with reading(f"folder '{root}'"), os.scandir(root) as listing:
        names = [e.name for e in listing if _is_folder(e) and not _reason_to_skip(e.name, is_folder=True)]
    return tuple(root / name for name in sorted(names))


def _is_folder(entry: "os.DirEntry[str]") -> bool | None:
    """None for a link that leads nowhere or in a circle."""
    try:
        if entry.is_dir():
            return True
        return False if not entry.is_symlink() or entry.stat() else None
    except OSError:
        return None


def _reason_to_skip(name: str, *, is_folder: bool | None) -> str:
    """The kind of thing that an entry is which is passed over by name; nothing for one that is not."""
    if is_folder is None and not is_photo_name(name):  # a photo that cannot be read is reported as such
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
