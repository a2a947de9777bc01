"""int8 and int4: block quantization with stochastic rounding. Alistarh et al. 2017, "QSGD: Communication-Efficient
SGD via Gradient Quantization and Encoding", in buckets, with the maximum norm of the bucket.

    encode, for each block b of 256 values:                        decode:
     1  s_b <- bf16, rounded up (max_i |x_i| / L)                   4  x̂_i <- q_i · s_b
     2  q_i <- floor(x_i / s_b + u_i),  u_i uniform in [0, 1); after a sparsifier u_i = 1/2
     3  int4 only: two codes in a byte, q + 8, the first in the low half

L = 127 (int8) or 7 (int4), so q_i lies in [-L, L] and E[x̂_i] = x_i; the variance is at most s_b²/4 per value.
8.06 and 4.06 bits per value. After a sparsifier, whose error feedback needs a contraction and corrects bias,
rounding is to nearest: then |x̂_i - x_i| <= |x_i| for every value, which stochastic rounding does not guarantee.

Differs from the paper: levels are not Elias-coded (zstd can follow); the scale is the largest magnitude, not the 2-norm
(a variant in the paper: no level is wasted); scales are bfloat16, since float16 would lose updates under 1e-5. Scales
are rounded *up*, which keeps every code inside ±L without clipping, which would bias the largest value. An all-zero
block has the least scale, and codes of zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedshelf.compression.dither import Dither
from fedshelf.compression.stage import CHUNK, Bytes, Floats, Parts, Properties, Specs
from fedshelf.core.errors import RefusedError

BLOCK = 256
_LEVELS = {8: 127, 4: 7}
_LEAST_SCALE = np.float32(2.0**-126)  # the least whose inverse is a normal float32
_MARGIN = 1 + 2.0**-20  # a code of exactly L plus the largest u must stay below L + 1 after float32's own rounding
_MOST = np.finfo(np.float32).max / 128  # all codes decode to finite values


@dataclass(frozen=True, slots=True)
class BlockInt:
    """Integers of 8 or 4 bits, one scale per 256 values.

    Attributes:
        bits: 8 or 4.
        unbiased: whether rounding is stochastic; otherwise to nearest.
    """

    bits: int
    unbiased: bool = True

    @property
    def text(self) -> str:
        return f"int{self.bits}"

    @property
    def properties(self) -> Properties:
        return Properties(unbiased=self.unbiased)

    def specs(self, size: int) -> Specs:
        codes = (torch.int8, size) if self.bits == 8 else (torch.uint8, -(-size // 2))
        return {"codes": codes, "scales": (torch.bfloat16, -(-size // BLOCK))}

    def encode(self, values: Floats, seed: int) -> Parts:
        size, dither = values.size, Dither(seed)
        codes: NDArray[np.int8] | Bytes
        codes = np.empty(size, np.int8) if self.bits == 8 else np.empty(-(-size // 2), np.uint8)
        scales = np.empty(-(-size // BLOCK), np.uint16)
        work, spare = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
        for start in range(0, size, CHUNK):
            length = min(CHUNK, size - start)
            num_blocks = -(-length // BLOCK)
            levels, noise = work[: num_blocks * BLOCK], spare[: num_blocks * BLOCK]
            levels[:length] = values[start : start + length]
            levels[length:] = 0
            np.abs(levels, out=noise)
            block_scales = _round_up(noise.reshape(-1, BLOCK).max(axis=1), _LEVELS[self.bits])  # line 1
            scales[start // BLOCK :][:num_blocks] = block_scales
            levels.reshape(-1, BLOCK)[:] *= (1 / _widen(block_scales))[:, None]
            if self.unbiased:
                dither.fill(noise)
            else:
                noise.fill(0.5)
            levels += noise
            np.floor(levels, out=levels)  # line 2
            if self.bits == 8:
                codes[start : start + length] = levels[:length]
            else:
                packed = _pack(levels)  # line 3
                codes[start // 2 :][: -(-length // 2)] = packed[: -(-length // 2)]
        return {
            "codes": torch.from_numpy(codes),
            "scales": torch.from_numpy(scales.view(np.int16)).view(torch.bfloat16),
        }

    def decode(self, parts: Mapping[str, Tensor], size: int) -> Floats:
        codes = parts["codes"].numpy()
        scales = _widen(parts["scales"].view(torch.int16).numpy().view(np.uint16))
        if not (np.all(scales >= 0) and np.all(scales <= _MOST)):  # NaN fails both
            raise RefusedError(
                f"the encoded vector ({self.text}) holds a scale that is negative, too large or not finite"
            )
        decoded = np.empty(-(-size // BLOCK) * BLOCK, np.float32)
        for start in range(0, size, CHUNK):
            length = min(CHUNK, size - start)
            chunk = decoded[start : start + -(-length // BLOCK) * BLOCK]
            chunk[length:] = 0  # arithmetic on uninitialized memory may warn about NaN
            if self.bits == 8:
                chunk[:length] = codes[start : start + length]
            else:
                nibbles = _unpack(codes[start // 2 :][: -(-length // 2)])
                chunk[:length] = nibbles[:length]
                chunk -= 8
            chunk.reshape(-1, BLOCK)[:] *= scales[start // BLOCK :][: chunk.size // BLOCK, None]  # line 4
        return decoded[:size]


int8, int4 = partial(BlockInt, 8), partial(BlockInt, 4)


def _round_up(largest: Floats, levels: int) -> NDArray[np.uint16]:
    """The bits of the least bfloat16 that is at least `largest` / `levels`."""
    wanted = np.maximum(largest * np.float32(_MARGIN / levels), _LEAST_SCALE)
    bits: NDArray[np.uint32] = wanted.view(np.uint32)
    bits += np.uint32(0xFFFF)
    bits >>= np.uint32(16)
    return bits.astype(np.uint16)


def _widen(bits: NDArray[np.uint16]) -> Floats:
    """The float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _pack(levels: Floats) -> Bytes:
    """Pack pairs of integers in [-8, 7] into bytes; pairs are handled as one 16-bit number, which vectorizes."""
    pairs: NDArray[np.uint16] = (levels + 8).astype(np.uint8).view("<u2")
    pairs |= pairs >> np.uint16(4)
    return pairs.astype(np.uint8)  # the lower byte


def _unpack(packed: Bytes) -> Bytes:
    pairs = packed.astype("<u2")
    pairs |= pairs << np.uint16(4)
    pairs &= np.uint16(0x0F0F)
    return pairs.view(np.uint8)
