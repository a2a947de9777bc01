"""The interfaces of the stages of a chain: their parts, declared properties, and three protocols.

A chain is ``[sparsifier] -> quantizer -> [lossless]``. A sparsifier selects which of the n values are sent, a quantizer
encodes those values in fewer bits, a lossless stage compresses the bytes of all parts.
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
"""The type and exact length of every part. Known from n alone, so that memory is never allocated for claimed sizes."""

FRACTION = Setting(key="F", help="the share of values that travel", gt=0, le=1)
"""Prefix of sparsifiers."""

CHUNK = 65536
"""Values processed at a time: 256 KB, which fit in a core's second-level cache."""

MAX_MAGNITUDE = 2.0**100
"""The largest magnitude that lossy stages encode: beyond it, squares, sums or rotations would overflow float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Properties:
    """The properties of a stage, or of a chain; the pipeline's rules are checks on them."""

    lossless: bool = False  # decode(encode(x)) == x, bit for bit
    unbiased: bool = False  # E[decode(encode(x))] == x over seeds (modular: for values inside its range)
    linear: bool = False  # sums of codes decode to the sum (where common_seed: if all used one support seed)
    modular: bool = False  # codes are integers modulo a power of two, as masks are
    bounded: bool = False  # decoded values lie in a range that the text states
    common_seed: bool = False  # which values are sent depends only on the support seed, never on the values
    needs_error_feedback: bool = False  # biased: what is left out must be added to the next vector
    kept_fraction: float = 1.0  # the share of values that are sent
    summands: int = 0  # modular: how many codes may be added before their sum wraps

    def __and__(self, other: "Properties") -> "Properties":
        """The properties of two stages in sequence."""
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
        """How the stage is written."""

    @property
    def properties(self) -> Properties:
        """The stage's properties."""


class Sparsifier(Codec, Protocol):
    """Selects the values to send."""

    def count(self, size: int) -> int:
        """k: the number of `size` values that are sent; at least one, if there is one."""

    def specs(self, size: int) -> Specs:
        """Type and number of elements of each part that encodes the selected indices of `size` values, by name."""

    def select(self, vector: Floats, seed: int) -> tuple[Indices, Parts]:
        """Select the values to send.

        Args:
            vector: all values, [size].
            seed: seed of a random selection.

        Returns:
            The indices of the selected values, increasing, [k]; and the parts that encode them.
        """

    def indices(self, parts: Mapping[str, Tensor], size: int) -> Indices:
        """Decode the indices.

        Args:
            parts: from a peer, untrusted.
            size: number of all values.

        Returns:
            The indices, increasing, [k].

        Raises:
            RefusedError: no honest encoder writes such parts.
        """


class Quantizer(Codec, Protocol):
    """Encodes float32 values in fewer bits.

    A quantizer with a field `unbiased`, true by default, has it set to false after a sparsifier, whose error feedback
    needs a contraction and corrects bias.
    """

    def specs(self, size: int) -> Specs:
        """Type and number of elements of each part that encodes `size` values, by name."""

    def encode(self, values: Floats, seed: int) -> Parts:
        """Encode values.

        Args:
            values: the values, [size]; not changed.
            seed: seed of random rounding.

        Returns:
            The parts, as `specs` declares them.
        """

    def decode(self, parts: Mapping[str, Tensor], size: int) -> Floats:
        """Decode the values.

        Args:
            parts: from a peer, untrusted.
            size: number of values.

        Returns:
            The values, [size].

        Raises:
            RefusedError: no honest encoder writes such parts.
        """


class Lossless(Codec, Protocol):
    """Compresses parts without loss."""

    def compress(self, parts: Parts) -> Parts:
        """Compress each part. One that would not become smaller is returned as it is."""

    def decompress(self, parts: Mapping[str, Tensor], specs: Specs) -> Parts:
        """Restore the parts.

        Args:
            parts: from a peer, untrusted.
            specs: the type and the number of elements of each part, by name.

        Returns:
            The parts that `specs` declares.

        Raises:
            RefusedError: the parts are others than those; found before memory is allocated for them.
        """
