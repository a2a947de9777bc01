"""The interface of differential privacy: whose data is protected, and what its settings rule out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

Unit = Literal["photo", "client"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Protection:
    """Differential privacy of a run. By default, there is none.

    Attributes:
        unit: what the guarantee is about: one photo of a store, or all that one store sends.
    """

    unit: ClassVar[Unit | None] = None

    def problems(self) -> list[str]:
        """What is contradictory in the settings, each with its remedy."""
        return []


NONE = Protection()
