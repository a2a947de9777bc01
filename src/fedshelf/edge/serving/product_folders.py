"""Finds the folder of a product among a store's training photos.

A product is known if the model names it, or if the store has a folder for it.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedshelf.core.class_folder import MAX_DEPTH, MAX_NAME_BYTES
from fedshelf.core.errors import DataError
from fedshelf.core.text import to_filesystem
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.folder import class_folder, has_split
from fedshelf.data.photo_files import list_photos, reason_to_skip

MAX_PRODUCT_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductFolder:
    """Where photos of a known product lie.

    Attributes:
        label: the model's name for the product; the folder's class path if the model does not know it.
        folder: its folder, relative to the data folder.
    """

    label: str
    folder: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductFolders:
    """The products of a model and of a store.

    Attributes:
        data_dir: the store's photo folder.
        labels: the model's products [K].
        paths: their folders and names [K].
    """

    data_dir: Path
    labels: Sequence[str] = ()
    paths: Sequence[str] = ()

    def find(self, product: str) -> ProductFolder | None:
        """The folder of a product; None if the product is not known.

        Of several folders that stand for the product, it is the one with the most photos. A product of the model for
        which the store has no folder gets the model's path.

        Args:
            product: the model's name for it, or a class path of the store, in any case.

        Raises:
            DataError: the photo folder cannot be read, or the model's path for the product is no name of a folder.
        """
        root = self._root
        listing = list_photos(root)
        num_photos = Counter(photo.class_path for photo in listing.photos)

        def on_disk(path: str) -> Path:
            return (root / min(listing.folders[path])).relative_to(self.data_dir)

        label = _match(product, self.labels)
        if label is None:
            path = _match(product, sorted(num_photos))
            return None if path is None else ProductFolder(label=path, folder=on_disk(path))
        index = self.labels.index(label)
        catalogue = Catalogue(tuple(self.labels), tuple((path,) for path in self.paths))
        own = [path for path in num_photos if catalogue.index_of(class_folder(path)) == index]
        if own:
            best = min(own, key=lambda path: (-num_photos[path], path))
            return ProductFolder(label=label, folder=on_disk(best))
        return ProductFolder(label=label, folder=self.new(self.paths[index]))

    def new(self, path: str) -> Path:
        """The folder of a product that the store does not have yet, relative to the data folder.

        Args:
            path: its class path.

        Raises:
            DataError: a scan would not find photos there, or it lies outside.
        """
        if problem := path_problem(path):
            raise DataError(f"'{path:.100}' cannot be a product's folder: {problem}")
        return (self._root / to_filesystem(path)).relative_to(self.data_dir)

    @property
    def _root(self) -> Path:
        return self.data_dir / "train" if has_split(self.data_dir) else self.data_dir


def path_problem(path: str) -> str:
    """Why a scan for photos would not find a product at a '/'-separated class path; empty if it would."""
    parts = path.split("/")
    if len(parts) > MAX_DEPTH:
        return f"it is more than {MAX_DEPTH} folders deep"
    for part in parts:
        if part in ("", ".", "..") or part != part.strip() or not part.isprintable():
            return "a part of it is empty, '.', '..', begins or ends with a blank, or holds a control character"
        if reason_to_skip(part, is_folder=True):
            return f"folders called '{part}' are not read as products"
        if len(part.encode()) > min(255, MAX_NAME_BYTES):
            return "a part of it is longer than 255 bytes"
    return ""


def checked_name(product: str) -> str:
    """A product's name as a person typed it, in Unicode's composed form, without surrounding blanks.

    Raises:
        DataError: it is empty, too long, or holds characters that cannot be seen.
    """
    try:
        product.encode()
    except UnicodeEncodeError:
        raise DataError("the product's name is not valid Unicode text") from None
    name = unicodedata.normalize("NFC", product.strip())
    if not name:
        raise DataError("the correction names no product: give its name in the field 'product'")
    if len(name) > MAX_PRODUCT_CHARACTERS:
        raise DataError(
            f"the product's name has {len(name):,} characters, {MAX_PRODUCT_CHARACTERS} is the most: shorten it"
        )
    if not name.isprintable():
        raise DataError("the product's name holds control or invisible characters: type it without them")
    return name


def _match(name: str, known: Sequence[str]) -> str | None:
    """The known name equal to `name`, or else the only one that differs in case alone, or by the folders above it."""
    if name in known:
        return name
    folded = name.casefold()
    alike = [other for other in known if other.casefold() == folded]
    alike = alike or [other for other in known if other.rsplit("/", 1)[-1].casefold() == folded]
    return alike[0] if len(alike) == 1 else None
