"""The interface of differential privacy: whose data is protected, and what its settings rule out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

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
        unit: what the guarantee is about: one photo of a store, or all that one store sends.
    """

    unit: ClassVar[Unit | None] = None

    def problems(self) -> list[str]:
        """What is contradictory in the settings, each with its remedy."""
        return []


NONE = Protection()


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise(Protection):
    """Differential privacy by Gaussian noise.

    Attributes:
        noise_multiplier: standard deviation of the noise, as a multiple of the clip norm.
        target_epsilon: epsilon of the whole run.
        delta: delta of the whole run.
        name: its name, for messages.
    """

    noise_multiplier: Annotated[float | None, NOISE_MULTIPLIER] = None
    target_epsilon: Annotated[float | None, TARGET_EPSILON] = None
    delta: Annotated[float, DELTA] = DEFAULT_DELTA
    name: ClassVar[str]

    def problems(self) -> list[str]:
        """What is contradictory in the settings: exactly one of noise and target is given."""
        if (self.noise_multiplier is None) != (self.target_epsilon is None):
            return []
        both = "" if self.noise_multiplier is None else ", not both"
        return [f"--dp {self.name} needs --target-epsilon or --noise-multiplier{both}"]
