"""How stores name their products. A module of its own, because what reads photos must not need torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class ClassFolder:
    """A class as a client sees it.

    Attributes:
        leaf: the folder's own name.
        path: its path below the data folder, '/' between.
    """

    leaf: str
    path: str
