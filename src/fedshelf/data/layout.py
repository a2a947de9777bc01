"""Checks that a folder is the intended one.

Certain mistakes raise a `DataError`; likely ones are returned as sentences, for the command to show before
training.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from fedshelf.core.errors import DataError, UsageError
from fedshelf.core.text import from_filesystem, some
from fedshelf.data.class_names import ALIKE, nested_stores, similar_names
from fedshelf.data.filesystem import folder_problem, reading
from fedshelf.data.photo_files import PHOTO_DATES, Listing, subfolders

logger = logging.getLogger(__name__)

_SPLIT_NAMES = frozenset(
    (
        "train", "training", "traindata", "trainset", "val", "valid", "validation", "valdata", "valset", "test",
        "tests", "testing", "testdata", "testset", "centraltest", "holdout", "heldout", "eval", "evaluation",
    )
)  # fmt: skip
_LABEL_FILES = frozenset((".csv", ".tsv", ".txt", ".json", ".jsonl"))
_LABEL_WORDS = frozenset(("label", "labels", "class", "classes", "class_name", "category", "product", "target", "sku"))
_NO_PRODUCTS = frozenset(("images", "image", "img", "imgs", "photos", "photo", "pictures", "jpegimages", "dcim"))
_LABEL_BYTES = 1 << 20  # of a file that may hold labels


def doubts(listing: Listing) -> list[str]:
    """Find signs that a store's folder is something else.

    Returns:
        One sentence for each finding.

    Raises:
        DataError: it is a folder of stores, it holds test photos next to its products, or a file holds its labels.
    """
    paths = sorted({photo.class_path for photo in listing.photos})
    found = [*_held_out(listing.root, paths), *_labels(listing)]
    stores, certain = nested_stores(paths)
    if stores:
        sentence = (
            f"'{listing.root}' looks like a folder of stores, not like one store: {stores}. Give the folder of one of "
            f"them, or simulate them all: fedshelf simulate --data-dir '{listing.root}'"
        )
        if certain:
            raise DataError(sentence)
        found.append(sentence)
    known = set(paths)
    if inside := [path for path in paths if known & {str(above) for above in PurePosixPath(path).parents}]:
        found.append(
            f"folders inside a product's folder, taken as products of their own ({len(inside)}): {some(inside)}"
        )
    alike = "; ".join(some(group) for group in similar_names(paths))
    return [*found, f"class names {ALIKE}: {alike}"] if alike else found


def store_folders(root: Path) -> dict[str, Path]:
    """The stores to simulate by name, one folder each.

    Raises:
        UsageError: there is no such folder.
        DataError: `root` cannot be read, holds no folder, is one store's folder, or also holds test photos.
    """
    if problem := folder_problem(root):
        raise UsageError(f"--data-dir {root}: {problem}")
    folders = {from_filesystem(path.name): path for path in subfolders(root)}
    if not folders:
        raise DataError(
            f"--data-dir '{root}' contains no folders: it must have one folder of photos per store "
            "('fedshelf data partition PHOTOS --out STORES' creates them)"
        )
    held_out = [name for name in folders if _plain(name) in _SPLIT_NAMES]
    if held_out and len(folders) > 1:
        raise DataError(
            f"--data-dir '{root}' holds {some(held_out)} next to other folders, and would train on it as on a store. "
            "Give a folder that holds stores alone; photos to test on go elsewhere, to --test-dir"
        )
    with reading(f"'{root}'"):
        products = [name for name, path in folders.items() if any(path.iterdir()) and not any(subfolders(path))]
    if 2 * len(products) > len(folders):
        raise DataError(
            f"--data-dir '{root}' looks like one store's folder, not like a folder of stores: there are no folders "
            f"of products in {some(products)}. To split it into stores: fedshelf data partition '{root}' --out stores"
        )
    with reading(f"'{root}'"):
        _warn_of_product_groups(root, folders)
    return folders


def _warn_of_product_groups(root: Path, folders: Mapping[str, Path]) -> None:
    """Warn if no product is in two stores: the folders may be groups of one store's products, such as Fruit."""
    inside = Counter(name for path in folders.values() for name in {folder.name for folder in subfolders(path)})
    if len(folders) > 1 and len(inside) > len(folders) and max(inside.values()) == 1:
        logger.warning(
            "--data-dir '%s': no product is in two of its folders (%s). If these are groups of one store's products, "
            "split them into stores first: fedshelf data partition '%s' --out stores", root, some(folders), root,
        )  # fmt: skip


def _held_out(root: Path, paths: Sequence[str]) -> list[str]:
    """Folders next to products whose names suggest test photos."""
    direct = [path for path in paths if "/" not in path and _plain(path) in _SPLIT_NAMES]
    if len(direct) > 1:
        raise DataError(
            f"'{root}' has no product folders: photos lie directly in {some(direct)}. Put them into a folder per "
            f"product, such as '{root}/train/PRODUCT/NAME.jpg'"
        )
    found = []
    tops = {path.split("/")[0] for path in paths if "/" in path}
    for top in sorted(top for top in tops if _plain(top) in _SPLIT_NAMES):
        inside = {_leaf(path) for path in paths if path.startswith(f"{top}/")}
        outside = {_leaf(path) for path in paths if not path.startswith(f"{top}/")}
        if shared := sorted(inside & outside):
            raise DataError(
                f"'{root}' holds '{top}' next to other folders with the same products ({some(shared)}): it would be "
                f"trained on, as other products than those. Move it elsewhere, or put the photos to train on into "
                f"'{root}/train' and those to validate on into '{root}/val'"
            )
        found.append(f"'{root}/{top}' is called like photos to test on, but would be trained on")
    return found


def _labels(listing: Listing) -> list[str]:
    """Find evidence that photos in a single folder show several products, such as a file with their labels.

    Raises:
        DataError: the file's first line confirms it.
    """
    names = [photo.path.name for photo in listing.photos] or listing.stray
    folders = {listing.root, *(photo.path.parent for photo in listing.photos)}
    if not names or len(folders) > 2 or (listing.photos and listing.stray):
        return []
    if _plain(listing.root.name) in _SPLIT_NAMES:
        folders.add(listing.root.parent)
    wanted = {*names, *(Path(name).stem for name in names)}
    with reading(f"'{listing.root}'"):
        files = sorted(path for folder in folders for path in folder.iterdir() if _may_hold_labels(path))
    for file in files:
        with reading(f"'{file}'"), file.open("rb") as opened:
            text = opened.read(_LABEL_BYTES).decode("utf-8-sig", "surrogateescape")
        words = {word.rsplit("/", 1)[-1] for word in re.split(r"[\s,;:'\"{}\[\]]+", text)}
        if 2 * len(words & wanted) < len(names):
            continue
        sentence = (
            f"'{file}' names photos that all lie in one folder: that file tells their products, it seems. FedShelf "
            f"takes a photo's product from its folder, so these would be one. Sort them into a folder for each product"
        )
        if _LABEL_WORDS & set(re.split(r"\W+", text.partition("\n")[0].casefold())):
            raise DataError(sentence)
        return [sentence]
    only = {_leaf(photo.class_path) for photo in listing.photos if _plain(_leaf(photo.class_path)) in _NO_PRODUCTS}
    return [f"all photos ({len(names)}) lie in a folder '{name}', which would be the only product" for name in only]


def _may_hold_labels(path: Path) -> bool:
    return path.suffix.lower() in _LABEL_FILES and path.name != PHOTO_DATES


def _leaf(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).casefold()
