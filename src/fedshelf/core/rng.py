"""Random generators keyed by purpose, and passed in explicitly.

No two purposes share a generator, so adding a draw in one place changes no other, and a round repeated after a crash
draws the same values again. Not for security: that uses `secrets`.
"""

import hashlib
import random
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Rng:
    """A seed that can be split by key.

    Attributes:
        seed: an unsigned 63-bit integer, valid as a seed for any library's generator.
    """

    seed: int

    def fork(self, *, purpose: str, round: int = 0, client: str = "") -> "Rng":
        """The independent child for `(round, client, purpose)`; equal keys give equal children."""
        key = f"{self.seed}\x1f{round}\x1f{client}\x1f{purpose}".encode()
        return Rng(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1)

    def torch(self) -> torch.Generator:
        """A CPU generator. Draws are made on the CPU and moved, so that all devices get the same values."""
        return torch.Generator().manual_seed(self.seed)

    def python(self) -> random.Random:
        """A standard library generator."""
        return random.Random(self.seed)
