"""Stochastic rounding: Alistarh et al. 2017, "QSGD: Communication-Efficient SGD via Gradient Quantization and
Encoding", its stochastic quantization with uniform levels.

    round(a) = floor(a + u),  u uniform in [0, 1)      so that  E[round(a)] = a

Differs from the paper: u has 16 bits and is centered, (k + 1/2) / 2^16, so E[round(a)] differs from a by at most 2^-17
of a step, which is less than float32's own rounding error of a block's largest value. The bits are the raw output of
SFC64, whose stream is the same in every version of numpy.
"""

import numpy as np

from fedshelf.compression.stage import Floats

_STEP = np.float32(2.0**-16)
_HALF = np.float32(2.0**-17)


class Dither:
    """The uniform numbers of one encoding, drawn in order.

    Args:
        seed: seed of the generator.
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.SFC64(seed)

    def fill(self, out: Floats) -> None:
        """Fill `out` [m], m a multiple of 4, with the next m uniform numbers."""
        out[:] = self._bits.random_raw(out.size // 4).view(np.uint16)
        out *= _STEP
        out += _HALF
