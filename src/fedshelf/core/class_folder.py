"""How stores name their products. A separate module, because code that reads photos must not import torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class ClassFolder:
    """A class as a client sees it.

    Attributes:
        leaf: the folder's name.
        path: the folder's path below the data folder, separated by '/'.
    """

    leaf: str
    path: str
