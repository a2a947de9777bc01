"""The parts of local training: what each moves, and for how long."""

from dataclasses import dataclass
from enum import StrEnum


class Moves(StrEnum):
    """Which trainable values an optimizer moves."""

    ALL = "all"
    SHARED = "shared"
    PERSONAL = "personal"


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A part of local training.

    Attributes:
        moves: what it moves.
        epochs: for how many epochs; None: as configured.
    """

    moves: Moves = Moves.ALL
    epochs: int | None = None
