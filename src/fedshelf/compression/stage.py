"""What the stages of a chain have in common: their parts, their declared properties, and three short protocols.

A chain is ``[sparsifier] -> quantizer -> [lossless]``. A sparsifier says which of the n values travel, a quantizer
writes those values as numbers of fewer bits, a lossless stage makes the bytes of all parts fewer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedshelf.core.settings import Setting

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Parts = dict[str, Tensor]
Specs = dict[str, tuple[torch.dtype, int]]
"""The type and the exact length of every part: known from n alone, so that nothing is allocated on a sender's word."""

FRACTION = Setting(key="F", help="the share of values that travel", gt=0, le=1)
"""Of sparsifiers."""

CHUNK = 65536
"""Values worked on at a time: 256 KB, which stay in a core's second-level cache."""

MAX_MAGNITUDE = 2.0**100
"""Larger values are not encoded by lossy stages: their squares, sums or rotations would leave float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Properties:
    """What a stage, or a chain of them, promises; the rules of the pipeline are checks on these."""

    lossless: bool = False  # decode(encode(x)) == x, bit for bit
    unbiased: bool = False  # E[decode(encode(x))] == x over seeds (modular: for values inside its range)
    linear: bool = False  # sums of codes decode to the sum (where common_seed: if all used one support seed)
    modular: bool = False  # codes are integers modulo a power of two, as masks are
    bounded: bool = False  # decoded values lie in a range that the text names
    common_seed: bool = False  # which values travel depends on the support seed alone, never on the values
    needs_error_feedback: bool = False  # biased: what was left out has to be added to the next vector
    kept_fraction: float = 1.0  # the share of values that travel
    summands: int = 0  # modular: how many codes may be added before their sum wraps

    def __and__(self, other: "Properties") -> "Properties":
        """The properties of one stage after the other."""
        return Properties(
            lossless=self.lossless and other.lossless,
            unbiased=self.unbiased and other.unbiased,
            linear=self.linear and other.linear,
            modular=(self.modular or other.modular) and self.linear and other.linear,
            bounded=self.bounded or other.bounded,
            common_seed=self.common_seed or other.common_seed,
            needs_error_feedback=self.needs_error_feedback or other.needs_error_feedback,
            kept_fraction=self.kept_fraction * other.kept_fraction,
            summands=max(self.summands, other.summands),
        )


class Codec(Protocol):
    """A stage of a chain."""

    @property
    def text(self) -> str:
        """How it is written."""

    @property
    def properties(self) -> Properties:
        """What it promises."""


class Sparsifier(Codec, Protocol):
    """Chooses the values that travel."""

    def count(self, size: int) -> int:
        """k: how many of `size` values travel; at least one, if there is one."""

    def specs(self, size: int) -> Specs: ...

    def select(self, vector: Floats, seed: int) -> tuple[Indices, Parts]:
        """The k indices, increasing, and the parts that say them."""

    def indices(self, parts: Mapping[str, Tensor], size: int) -> Indices:
        """The k indices, increasing; raises RefusedError where the parts do not say such."""


class Quantizer(Codec, Protocol):
    """Writes float32 values as numbers of fewer bits.

    One with a field `unbiased`, true by default, has it set to false after a sparsifier: its error feedback wants a
    contraction, and makes up for bias.
    """

    def specs(self, size: int) -> Specs: ...

    def encode(self, values: Floats, seed: int) -> Parts: ...

    def decode(self, parts: Mapping[str, Tensor], size: int) -> Floats:
        """The values; raises RefusedError where a part holds what no honest encoder writes."""


class Lossless(Codec, Protocol):
    """Makes the bytes of parts fewer, and gives the same parts back."""

    def compress(self, parts: Parts) -> Parts: ...

    def decompress(self, parts: Mapping[str, Tensor], specs: Specs) -> Parts:
        """The parts that `specs` names; raises RefusedError for anything else, before allocating for it."""
