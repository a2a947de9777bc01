"""randk: values chosen by a seed. Konečný et al. 2016, "Federated Learning: Strategies for Improving Communication
Efficiency" (random masks); Stich, Cordonnier & Jaggi 2018, "Sparsified SGD with Memory".

    1  k <- round(F · n), at least 1;  r <- uniform in 0..n-1
    2  cut 0..n-1 into k stretches of equal length (give or take one); draw one index from each
    3  S <- those indices, each plus r modulo n
    4  C(x)_i <- x_i for i in S, else 0

Each index is in S with probability k/n, so E||x - C(x)||² = (1 - k/n) ||x||²: a contraction, used with error feedback.
Clients with the same support seed choose the same S, so their codes can be added; S reveals nothing about their values.
The seed is sent (8 bytes) instead of the indices.

Differs from the papers: one index per stretch instead of any k (the same probability for each, and no permutation of n
indices to draw). Values are not multiplied by n/k, which would make C unbiased: its variance, n/k - 1 times ||x||²,
overwhelms the signal at small F, and error feedback diverges with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from fedshelf.compression.stage import FRACTION, Floats, Indices, Parts, Properties, Specs
from fedshelf.compression.topk import kept
from fedshelf.core.errors import RefusedError

SEED = "support_seed"


@dataclass(frozen=True, slots=True)
class RandK:
    """Sends a random fraction of the values, the same for all clients with the same seed.

    Attributes:
        fraction: the share of values sent (F).
    """

    fraction: Annotated[float, FRACTION]

    @property
    def text(self) -> str:
        return f"randk:{self.fraction!r}"

    @property
    def properties(self) -> Properties:
        return Properties(linear=True, common_seed=True, needs_error_feedback=True, kept_fraction=self.fraction)

    def count(self, size: int) -> int:
        return kept(self.fraction, size)

    def specs(self, size: int) -> Specs:
        return {SEED: (torch.int64, 1)}

    def select(self, vector: Floats, seed: int) -> tuple[Indices, Parts]:
        return support(seed, vector.size, self.count(vector.size)), {SEED: torch.tensor([seed])}

    def indices(self, parts: Mapping[str, Tensor], size: int) -> Indices:
        seed = int(parts[SEED])
        if seed < 0:
            raise RefusedError("the encoded vector's support seed is negative")
        return support(seed, size, self.count(size))


def support(seed: int, size: int, count: int) -> Indices:
    """S: `count` of `size` indices, increasing (lines 1-3)."""
    if count == 0:
        return np.empty(0, np.int64)
    bits = np.random.SFC64(seed)
    shift = int(bits.random_raw()) % size
    bounds = np.arange(count + 1, dtype=np.int64) * size // count
    draws = bits.random_raw(count) >> np.uint64(32)
    chosen = bounds[:-1] + ((draws * np.diff(bounds).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)
    wrapped = int(np.searchsorted(chosen, size - shift))  # from here on, chosen + shift exceeds the end
    return np.concatenate([chosen[wrapped:] + (shift - size), chosen[:wrapped] + shift])
