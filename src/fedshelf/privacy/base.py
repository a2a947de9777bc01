"""The interface of differential privacy: whose data is protected, and what its settings rule out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedshelf.core.settings import PRIVACY, Setting

DEFAULT_DELTA = 1e-5
NOISE_MULTIPLIER = Setting(
    key="noise_multiplier", gt=0, panel=PRIVACY,
    help="Standard deviation of the noise, as a multiple of --clip-norm (default: what --target-epsilon needs).",
)  # fmt: skip
TARGET_EPSILON = Setting(
    key="target_epsilon", gt=0, panel=PRIVACY,
    help="Privacy loss of the whole run, from which the noise follows.",
)  # fmt: skip
DELTA = Setting(key="delta", gt=0, lt=1, panel=PRIVACY, help="Probability that the guarantee fails.")

Unit = Literal["photo", "client"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Protection:
    """Differential privacy of a run. By default, there is none.

    Attributes:
        delta: delta of the whole run.
        unit: what the guarantee is about: one photo of a store, or all that one store sends.
    """

    unit: ClassVar[Unit | None] = None
    delta: float = DEFAULT_DELTA

    def problems(self) -> list[str]:
        """What is contradictory in the settings, each with its remedy."""
        return []


NONE = Protection()


def problems_with_noise(dp: str, noise_multiplier: float | None, target_epsilon: float | None) -> list[str]:
    """What is wrong if not exactly one of the two is given."""
    if (noise_multiplier is None) != (target_epsilon is None):
        return []
    both = "" if noise_multiplier is None else ", not both"
    return [f"--dp {dp} needs --target-epsilon or --noise-multiplier{both}"]
