"""Phases of local training: which values each moves, and for how long. Free of torch, for the command line."""

from dataclasses import dataclass
from enum import StrEnum


class Moves(StrEnum):
    """The trainable values that an optimizer moves."""

    ALL = "all"
    SHARED = "shared"
    PERSONAL = "personal"
    HEAD = "head"


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A phase of local training.

    Attributes:
        moves: the values that it moves.
        epochs: number of epochs; None: as configured.
    """

    moves: Moves = Moves.ALL
    epochs: int | None = None
