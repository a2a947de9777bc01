"""drive: one bit per value. Vargaftik et al. 2021, "DRIVE: One-bit Distributed Mean Estimation", algorithm 1 with the
randomized Hadamard rotation; at one bit also Vargaftik et al. 2022, "EDEN".

    encode, for each block x of d = 2^p values, D = diag(random signs of the seed), H = the Hadamard matrix of ±1:
     1  y <- H D x
     2  send sign(y), d bits
     3  send S <- ||x||² / ||y||_1           unbiased; after a sparsifier S <- ||y||_1 / d²
    decode:
     4  x̂ <- S · D H sign(y)

The rotation makes the values of a block nearly normal for any input; so the normalized error of one vector,
||x - x̂||²/||x||², is near pi/2 - 1 = 0.571, and that of a mean over m clients near 0.571/m. After a sparsifier,
whose error feedback needs a contraction, S is the scale of least error: 1 - 2/pi = 0.363 instead, and biased.

Why DRIVE and not EDEN: at one bit they are the same estimator (EDEN's centroids ±sqrt(2/pi) cancel in its scale); EDEN
adds other bit widths, for which there are int4 and int8 here.

Differs from the papers: blocks of at most 2^16 values, each with its own scale, stay in the cache and follow the scales
of layers; the rest is split into smaller powers of two instead of being padded to the next one (only its last 1,023
values or fewer are). H is not divided by sqrt(d): then H sign(y) are integers below 2^24, exact in float32 in any order
of summation, so that every machine decodes the same bits. The proofs of unbiasedness are for uniform rotations; H D is
close to that for blocks of more than a few dozen values that are not very sparse.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedshelf.compression.stage import Bytes, Floats, Parts, Properties, Specs
from fedshelf.core.errors import RefusedError

SEED = "rotation_seed"
_LARGEST, _SMALLEST = 16, 10  # powers of two
_SIGNS = 1 - 2 * np.unpackbits(np.arange(256, dtype=np.uint8)).astype(np.float32).reshape(256, 8)
"""The eight signs in each byte, highest bit first."""
_MOST = float(np.finfo(np.float32).max) / 2**_LARGEST


@dataclass(frozen=True, slots=True)
class Drive:
    """The signs of rotated blocks.

    Attributes:
        unbiased: whether the scale is unbiased; otherwise that of least error.
        text: how the stage is written.
    """

    unbiased: bool = True
    text: str = "drive"

    @property
    def properties(self) -> Properties:
        return Properties(unbiased=self.unbiased)

    def specs(self, size: int) -> Specs:
        powers = _powers(size)
        return {
            "signs": (torch.uint8, sum(count << power - 3 for power, count in powers)),
            "scales": (torch.float32, sum(count for _, count in powers)),
            SEED: (torch.int64, 1),
        }

    def encode(self, values: Floats, seed: int) -> Parts:
        specs = self.specs(values.size)
        signs, scales = np.empty(specs["signs"][1], np.uint8), np.empty(specs["scales"][1], np.float32)
        for number, block in enumerate(_blocks(values.size, seed)):
            given = values[block.start : block.start + block.dimension]
            x = np.zeros(block.dimension, np.float32)
            x[: given.size] = given
            norm = float(np.sum(np.square(x, dtype=np.float64)))  # not a dot product: BLAS may split it over threads
            y = _hadamard(_flip(x, block.flips), block.power, inverse=False)  # line 1
            signs[block.byte : block.byte + block.dimension // 8] = np.packbits(y < 0)  # line 2
            absolute = float(np.sum(np.abs(y, out=y), dtype=np.float64))
            if self.unbiased:
                scales[number] = norm / absolute if absolute else 0.0  # line 3
            else:
                scales[number] = absolute / block.dimension**2
        return {"signs": torch.from_numpy(signs), "scales": torch.from_numpy(scales), SEED: torch.tensor([seed])}

    def decode(self, parts: Mapping[str, Tensor], size: int) -> Floats:
        signs, scales, seed = parts["signs"].numpy(), parts["scales"].numpy(), int(parts[SEED])
        if seed < 0:
            raise RefusedError("the encoded vector's rotation seed is negative")
        if not (np.all(scales >= 0) and np.all(scales <= _MOST)):  # NaN fails both
            raise RefusedError("the encoded vector (drive) holds a scale that is negative, too large or not finite")
        decoded = np.empty(size, np.float32)
        for number, block in enumerate(_blocks(size, seed)):
            y = _SIGNS.take(signs[block.byte : block.byte + block.dimension // 8], axis=0).reshape(-1)
            x = _hadamard(y, block.power, inverse=True)
            x *= scales[number]
            out = decoded[block.start : block.start + block.dimension]
            out[:] = _flip(x, block.flips)[: out.size]  # line 4
        return decoded


@dataclass(frozen=True, kw_only=True, slots=True)
class _Block:
    """A block of 2^power values.

    Attributes:
        start: first value.
        byte: first byte of its signs.
        power: log2 of its size.
        flips: the random bits of D, eight per byte.
    """

    start: int
    byte: int
    power: int
    flips: Bytes

    @property
    def dimension(self) -> int:
        return 1 << self.power


def _powers(size: int) -> list[tuple[int, int]]:
    """The blocks of `size` values as (power, count), largest first."""
    powers = [(_LARGEST, size >> _LARGEST)]
    powers += [(power, size >> power & 1) for power in range(_LARGEST - 1, _SMALLEST - 1, -1)]
    rest = size % (1 << _SMALLEST)
    powers.append((max(3, (rest - 1).bit_length()), 1 if rest else 0))  # at least a byte of signs
    return [(power, count) for power, count in powers if count]


def _blocks(size: int, seed: int) -> Iterator[_Block]:
    generator, start = np.random.SFC64(seed), 0
    for power, count in _powers(size):
        for _ in range(count):
            raw = generator.random_raw(max(1, (1 << power) // 64)).astype("<u8").view(np.uint8)
            yield _Block(start=start, byte=start // 8, power=power, flips=raw[: 1 << power - 3])
            start += 1 << power


def _flip(values: Floats, flips: Bytes) -> Floats:
    """Multiply `values` by D in place: set bits flip the sign."""
    values *= _SIGNS.take(flips, axis=0).reshape(-1)
    return values


def _hadamard(values: Floats, power: int, *, inverse: bool) -> Floats:
    """Multiply `values` [2^power] by H, in a fixed permuted order: for values as a matrix X, H X H transposed.

    With `inverse`, the order is restored: one after the other, the two are 2^power times the identity. `values` is
    overwritten.
    """
    rows = 1 << (power // 2 if inverse else power - power // 2)
    columns = values.size // rows
    values, spare = _transform_columns(values, np.empty_like(values), rows)
    torch.from_numpy(spare).view(columns, rows).copy_(torch.from_numpy(values).view(rows, columns).T)
    return _transform_columns(spare, values, columns)[0]  # rows have become columns, where numpy is fast


def _transform_columns(values: Floats, spare: Floats, rows: int) -> tuple[Floats, Floats]:
    """Multiply the matrix `values` [rows, ...] by H in log2(rows) rounds of sums and differences."""
    columns = values.size // rows
    for half in (1 << p for p in range(rows.bit_length() - 1)):
        pairs, out = (array.reshape(-1, 2, half * columns) for array in (values, spare))
        np.add(pairs[:, 0], pairs[:, 1], out=out[:, 0])
        np.subtract(pairs[:, 0], pairs[:, 1], out=out[:, 1])
        values, spare = spare, values
    return values, spare
