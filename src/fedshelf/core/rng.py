"""Randomness is passed in, and keyed by what it is for.

A generator is never shared between two purposes, so adding a draw in one place changes no other, and a round
repeated after a crash draws what it drew before. Nothing here is for security: that uses `secrets`.
"""

import hashlib
import random
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Rng:
    """A seed that can be split by key.

    `seed` is an unsigned 63-bit integer; feed it to any library's generator.
    """

    seed: int

    def fork(self, *, purpose: str, round: int = 0, client: str = "") -> "Rng":
        """The independent child for `(round, client, purpose)`; equal keys give equal children."""
        key = f"{self.seed}\x1f{round}\x1f{client}\x1f{purpose}".encode()
        return Rng(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1)

    def torch(self) -> torch.Generator:
        """A CPU generator: draws are made on the CPU and moved, so that every device sees the same ones."""
        return torch.Generator().manual_seed(self.seed)

    def python(self) -> random.Random:
        """A standard library generator."""
        return random.Random(self.seed)
