"""topk: the values of largest magnitude. Aji & Heafield 2017, "Sparse Communication for Distributed Gradient Descent";
Stich, Cordonnier & Jaggi 2018, "Sparsified SGD with Memory".

    1  k <- round(F · n), at least 1
    2  S <- the indices of the k largest |x_i|
    3  C(x)_i <- x_i for i in S, else 0

It is a contraction: ||x - C(x)||² <= (1 - k/n) ||x||², and biased: it needs error feedback (`feedback`).

Differs from the paper: ties at the threshold are broken by the lowest index, so that the choice is the same everywhere.
Aji & Heafield estimate the threshold from a sample; here a sample only narrows the search, and the choice is exact.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedshelf.compression import index_sets
from fedshelf.compression.stage import CHUNK, FRACTION, Floats, Indices, Parts, Properties, Specs

_SAMPLE = 1 << 16


@dataclass(frozen=True, slots=True)
class TopK:
    """Sends the values of largest magnitude.

    Attributes:
        fraction: the share of values sent (F).
    """

    fraction: Annotated[float, FRACTION]

    @property
    def text(self) -> str:
        return f"topk:{self.fraction!r}"

    @property
    def properties(self) -> Properties:
        return Properties(needs_error_feedback=True, kept_fraction=self.fraction)

    def count(self, size: int) -> int:
        return kept(self.fraction, size)

    def specs(self, size: int) -> Specs:
        return index_sets.specs(size, self.count(size))

    def select(self, vector: Floats, seed: int) -> tuple[Indices, Parts]:
        indices = largest(vector, self.count(vector.size))
        return indices, index_sets.encode(indices, vector.size)

    def indices(self, parts: Mapping[str, Tensor], size: int) -> Indices:
        return index_sets.decode(parts, size, self.count(size))


def kept(fraction: float, size: int) -> int:
    """k (line 1)."""
    return min(size, max(1, round(fraction * size)))


def largest(vector: Floats, count: int) -> Indices:
    """The indices [count] of the largest magnitudes of `vector` [n], increasing; ties go to the lowest index."""
    candidates = _candidates(vector, count)
    magnitudes = _magnitudes(vector[candidates])
    rest = magnitudes.size - count
    if rest == 0:
        return candidates
    threshold = np.partition(magnitudes, rest)[rest]
    chosen = magnitudes > threshold
    ties = np.flatnonzero(magnitudes == threshold)
    chosen[ties[: count - int(np.count_nonzero(chosen))]] = True
    return np.asarray(candidates[chosen])


def _candidates(vector: Floats, count: int) -> Indices:
    """At least `count` indices, including the largest magnitudes: those above a bound estimated from a sample."""
    size = vector.size
    if size > 4 * _SAMPLE:
        sample = _magnitudes(vector[:: size // _SAMPLE])
        rank = sample.size * count / size
        rank += 4 * math.sqrt(rank) + 8  # four standard deviations: the estimate is very rarely too high
        if rank < sample.size:
            bound = np.partition(sample, sample.size - 1 - int(rank))[sample.size - 1 - int(rank)]
            found = [
                start + np.flatnonzero(_magnitudes(vector[start : start + CHUNK]) >= bound)
                for start in range(0, size, CHUNK)
            ]
            candidates = np.concatenate(found)
            if candidates.size >= count:
                return candidates
    return np.arange(size, dtype=np.int64)


def _magnitudes(values: Floats) -> NDArray[np.int32]:
    """|x| as integers of the same order: faster to compare and to partition than floats."""
    return np.bitwise_and(np.ascontiguousarray(values).view(np.int32), np.int32(0x7FFFFFFF))
