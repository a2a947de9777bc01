"""modular: integers that may be added modulo 2^BITS. Bonawitz et al. 2017, "Practical Secure Aggregation for
Privacy-Preserving Machine Learning" (sums of masked inputs modulo R); Bonawitz et al. 2019, "Federated Learning with
Autotuned Communication-Efficient Secure Aggregation" (quantized inputs to it).

    L <- floor((2^(BITS-1) - 1) / m)              levels of one of m summands
    1  c_i <- clip(x_i, -RANGE, RANGE)
    2  q_i <- floor(c_i · L / RANGE + u_i),  u_i uniform in [0, 1)
    3  send q_i mod 2^BITS
    decode a code, or a sum of up to m codes mod 2^BITS:
    4  x̂_i <- q_i · RANGE / L,  q_i read as a signed integer

Text: ``modular:BITS``, ``modular:BITS:RANGE``, or ``modular:BITS:RANGE:SUMMANDS`` for m other than 64. Without a RANGE
(or with 0), it is 1 for a vector on its own, and for all of an upload it follows from the layout (`upload_grid`). Since
|q_i| <= L, m codes sum to at most 2^(BITS-1) - 1: the sum never wraps past its sign. Values inside ±RANGE are unbiased;
those outside are clipped.

Differs from the papers: BITS is 8, 16 or 32, a machine integer, which adds modulo 2^BITS natively; rounding is
stochastic; there is no rotation before it; the range covers the largest possible sum, where the second paper saves bits
by relying on a likely one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from fedshelf.compression.dither import Dither
from fedshelf.compression.stage import CHUNK, MAX_MAGNITUDE, Floats, Parts, Properties, Specs
from fedshelf.core.settings import Setting

TYPES = {8: torch.int8, 16: torch.int16, 32: torch.int32}
DEFAULT_SUMMANDS = 64
DEFAULT_RANGE = 1.0


@dataclass(frozen=True, slots=True)
class Modular:
    """Integers whose codes can be added.

    Attributes:
        bits: bits per value.
        range: largest magnitude of a value; 0: from the layout.
        summands: number of codes that can be added.
    """

    bits: Annotated[int, Setting(key="BITS", help="8, 16 or 32")]
    range: Annotated[float, Setting(key="RANGE", help="the largest value", ge=0, le=MAX_MAGNITUDE)] = 0.0
    summands: Annotated[int, Setting(key="SUMMANDS", help="codes that can be added", ge=1)] = DEFAULT_SUMMANDS

    def __post_init__(self) -> None:
        if self.bits not in TYPES:
            raise ValueError(f"there are no integers of {self.bits} bits: choose 8, 16 or 32")
        if 0 < self.range < 1 / MAX_MAGNITUDE:
            raise ValueError(f"RANGE = {self.range!r} is not at least {1 / MAX_MAGNITUDE:.3g}, nor 0 for the layout's")
        if self.levels < 1:
            most = 2 ** (self.bits - 1) - 1
            raise ValueError(f"{self.bits} bits have no room for {self.summands} summands: choose from 1 to {most}")

    @property
    def text(self) -> str:
        room = "" if self.summands == DEFAULT_SUMMANDS else f":{self.summands}"
        bound = f":{self.range!r}" if self.range else ":0" if room else ""
        return f"modular:{self.bits}{bound}{room}"

    @property
    def levels(self) -> int:
        """L: the largest code of one summand."""
        return ((1 << (self.bits - 1)) - 1) // self.summands

    @property
    def step(self) -> float:
        """The value of a difference of one in a code."""
        return self._range / self.levels

    @property
    def _range(self) -> float:
        return self.range or DEFAULT_RANGE

    @property
    def properties(self) -> Properties:
        return Properties(unbiased=True, linear=True, modular=True, bounded=True, summands=self.summands)

    def specs(self, size: int) -> Specs:
        return {"codes": (TYPES[self.bits], size)}

    def encode(self, values: Floats, seed: int) -> Parts:
        codes, dither = np.empty(values.size, f"i{self.bits // 8}"), Dither(seed)
        noise = np.empty(CHUNK, np.float32)
        for start in range(0, values.size, CHUNK):
            chunk = values[start : start + CHUNK].astype(
                np.float64
            )  # float32 lacks the precision for 31 bits of levels
            np.clip(chunk, -self._range, self._range, out=chunk)  # line 1
            chunk *= self.levels / self._range
            dither.fill(noise[: -(-chunk.size // 4) * 4])
            chunk += noise[: chunk.size]
            codes[start : start + CHUNK] = np.floor(chunk, out=chunk)  # lines 2 and 3
        return {"codes": torch.from_numpy(codes)}

    def decode(self, parts: Mapping[str, Tensor], size: int) -> Floats:
        decoded, codes = np.empty(size, np.float32), parts["codes"].numpy()
        for start in range(0, size, CHUNK):
            decoded[start : start + CHUNK] = codes[start : start + CHUNK] * self.step  # line 4, in float64
        return decoded
