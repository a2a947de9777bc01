"""The tree of folders above the products, such as `Fruit/Apple/Pink-Lady`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from fedshelf.core.class_folder import MAX_DEPTH


@dataclass(frozen=True)
class ProductTree:
    """One path for each class. Level 1 is the coarsest, level `depth` are the products themselves.

    Attributes:
        paths: by class, its unique path, separated by '/'.
    """

    paths: tuple[str, ...]

    @classmethod
    def of(cls, names: Sequence[str], members: Sequence[Sequence[str]]) -> "ProductTree":
        """Choose a path for each class, as stores may keep it in different folders.

        It is the path below the folder that holds the most classes; of several such folders, below the first in sorted
        order. A path without any folder above it is chosen only if there is no other.

        Args:
            names: the classes' names; a class without any path has its name as one.
            members: by class, its paths in all stores.
        """
        num_classes = Counter(folder for paths in members for folder in {_above(path) for path in paths})

        def rank(path: str) -> tuple[bool, int, str]:
            return not _above(path), -num_classes[_above(path)], path

        return cls(tuple(min(paths or (name,), key=rank) for name, paths in zip(names, members, strict=True)))

    @cached_property
    def depth(self) -> int:
        """Number of levels; 1 if no class has a folder above it."""
        return min(MAX_DEPTH, max(path.count("/") + 1 for path in self.paths))

    def nodes(self, level: int) -> tuple[str, ...]:
        """By class, the folder that it lies in at a level; the class itself if its path is no longer than that."""
        if level >= self.depth:
            return self.paths
        return tuple("/".join(path.split("/", level)[:level]) for path in self.paths)

    def correct(self, confusion: Mapping[tuple[int, int], int]) -> tuple[int, ...]:
        """Count the photos whose prediction lies in the correct folder.

        Args:
            confusion: photos by class and predicted class.

        Returns:
            The count for each level, coarsest first.
        """
        levels = (self.nodes(level) for level in range(1, self.depth + 1))
        return tuple(
            sum(count for (label, prediction), count in confusion.items() if nodes[label] == nodes[prediction])
            for nodes in levels
        )


def _above(path: str) -> str:
    return path.rpartition("/")[0]
