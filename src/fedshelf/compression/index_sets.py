"""k of n indices in nearly the least possible bytes: Elias 1974, "Efficient storage and retrieval by content and
address of static files"; Fano 1971. Also known as Elias-Fano; within 0.56 bits per index of the least possible.

    l <- floor(log2(n / k))
    low:  the l lower bits of each index, packed
    high: a bitmap; for index i_j (j = 0, 1, ...), bit (i_j >> l) + j is set: k ones among k + (n >> l) bits

10 % of the values cost 5.3 bits per index, 1 % 8.6, 0.1 % 12. Where a plain bitmap of n bits is not longer (from about
a third of the values on), it is used instead. Which one, and its length, follow from (n, k) alone.

Differs from the paper: nothing in the coding; no rank or select structure, since indices are read all at once.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedshelf.compression.stage import Indices, Parts, Specs
from fedshelf.core.errors import RefusedError


def specs(size: int, count: int) -> Specs:
    """The parts of `count` indices below `size`."""
    bitmap = -(-size // 8)
    if count == 0:
        return {"index_bitmap": (torch.uint8, bitmap)}
    low = -(-count * _low_bits(size, count) // 8)
    high = -(-_high_length(size, count) // 8)
    if bitmap <= low + high:
        return {"index_bitmap": (torch.uint8, bitmap)}
    return {"index_low": (torch.uint8, low), "index_high": (torch.uint8, high)}


def encode(indices: Indices, size: int) -> Parts:
    """Encode `indices` [k], increasing, all below `size`."""
    count = indices.size
    if "index_bitmap" in specs(size, count):
        return {"index_bitmap": _bitmap(indices, size)}
    bits = _low_bits(size, count)
    low = np.empty((count, bits), np.uint8)
    for position in range(bits):
        low[:, position] = (indices >> (bits - 1 - position)) & 1
    high = (indices >> bits) + np.arange(count)
    return {
        "index_low": torch.from_numpy(np.packbits(low)),
        "index_high": _bitmap(high, _high_length(size, count)),
    }


def decode(parts: Mapping[str, Tensor], size: int, count: int) -> Indices:
    """Decode the indices [count], increasing.

    Args:
        parts: with the types and lengths of `specs(size, count)`.
        size: n.
        count: k.

    Raises:
        RefusedError: not `count` indices, one beyond `size`, or not increasing.
    """
    if "index_bitmap" in parts:
        return _ones(parts["index_bitmap"], size, count)
    bits = _low_bits(size, count)
    indices = _ones(parts["index_high"], _high_length(size, count), count)
    indices -= np.arange(count)
    low = np.unpackbits(parts["index_low"].numpy(), count=count * bits).reshape(count, bits)
    for position in range(bits):
        indices <<= 1
        indices |= low[:, position]
    if indices[-1] >= size or not np.all(indices[1:] > indices[:-1]):
        raise RefusedError(f"the encoded vector's indices do not increase, or leave the {size:,} values")
    return indices


def _low_bits(size: int, count: int) -> int:
    return max(0, (size // count).bit_length() - 1)


def _high_length(size: int, count: int) -> int:
    return ((size - 1) >> _low_bits(size, count)) + count


def _bitmap(positions: Indices, length: int) -> Tensor:
    bits: NDArray[np.uint8] = np.zeros(length, np.uint8)
    bits[positions] = 1
    return torch.from_numpy(np.packbits(bits))


def _ones(bitmap: Tensor, length: int, count: int) -> Indices:
    positions = np.flatnonzero(np.unpackbits(bitmap.numpy()))
    if positions.size != count or (count and positions[-1] >= length):
        raise RefusedError(
            f"the encoded vector names {positions.size:,} indices instead of {count:,}, or some outside it"
        )
    return positions.astype(np.int64, copy=False)
