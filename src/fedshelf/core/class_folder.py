"""How stores name and count their products. A separate module, because code that reads photos must not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedshelf.core.bounds import Count, Identifier, PathText
from fedshelf.core.text import counted

MAX_CLASSES = 20_000  # class folders of one store: more products than a hypermarket sells
MAX_DEPTH = 32  # folders in a path
MAX_NAME_BYTES = 4 * 255  # of a folder: file systems have 255, and an invalid byte is written as \xNN


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class ClassFolder:
    """A class as a client sees it.

    Attributes:
        leaf: the folder's name.
        path: the folder's path below the data folder, separated by '/'.
    """

    leaf: Identifier
    path: PathText


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductCount:
    """A model's score on the photos of one product.

    Attributes:
        index: the product's index in the catalogue.
        correct: photos classified correctly.
        total: photos.
    """

    index: Count
    correct: Count
    total: Count


def problem_with(classes: Sequence[ClassFolder]) -> str:
    """Why a store's class folders cannot be used; empty if they can. Names the limit, and the value beyond it."""
    if not classes:
        return "it holds no class folder"
    if len(classes) > MAX_CLASSES:
        return f"it holds {counted(len(classes), 'class folder')}, {MAX_CLASSES:,} is the most"
    for folder in classes:
        parts = folder.path.split("/")
        if len(parts) > MAX_DEPTH:
            depth = counted(len(parts), "folder")
            return f"a class folder lies {depth} deep, {MAX_DEPTH} is the most: '{folder.path[:100]}…'"
        if "" in parts:
            return "the path of a class folder has an empty part"
        if folder.leaf != parts[-1]:
            return f"a class folder is called '{folder.leaf[:100]}', and its path ends in '{parts[-1][:100]}'"
        longest = max(len(part.encode()) for part in parts)
        if longest > MAX_NAME_BYTES:
            return f"the name of a class folder has {counted(longest, 'byte')}, {MAX_NAME_BYTES:,} is the most"
    return ""
