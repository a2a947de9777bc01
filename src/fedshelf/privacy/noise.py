"""Random numbers that nobody can predict, for noise and for secret samples.

They come from AES-256 in counter mode under a key of the operating system's generator. The run's seed, which every
client knows, plays no part. The key is the only state: whoever keeps it can draw the same numbers again.

Gaussian values have a radius in float64 and an angle in float32 (Box and Muller 1958). Their low bits are not those of
an ideal Gaussian (Mironov 2012, "On Significance of the Least Significant Bits for Differential Privacy"): a guarantee
assumes that nobody exploits that.
"""

import secrets

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KEY_BYTES = 32
_FRACTION = 2.0**-53  # a float64 between 0 and 1 has 53 random bits


def new_key() -> bytes:
    """A new key, which nobody can predict."""
    return secrets.token_bytes(KEY_BYTES)


class SecretRandom:
    """A cryptographic generator.

    Args:
        key: 32 bytes; by default new ones.

    Raises:
        ValueError: the key has another length.
    """

    def __init__(self, key: bytes | None = None) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes  # 30 ms, only with privacy

        key = new_key() if key is None else key
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key of {len(key)} bytes instead of {KEY_BYTES}")
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def random_raw(self, count: int) -> NDArray[np.uint64]:
        """Draw `count` integers of 64 random bits."""
        return np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8")

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Draw `count` values in [0, 1)."""
        return (self.random_raw(count) >> np.uint64(11)).astype(np.float64) * _FRACTION

    def normal(self, count: int) -> Tensor:
        """Draw `count` values of a standard normal distribution, as float32 on the CPU."""
        half = -(-count // 2)
        radius = np.sqrt(-2 * np.log1p(-self.uniform(half)))  # of 1 - u, which is never zero
        angle = (2 * np.pi * self.uniform(half)).astype(np.float32)  # of which sine and cosine are far faster
        values = np.empty(2 * half, dtype=np.float32)
        values[:half], values[half:] = radius * np.cos(angle), radius * np.sin(angle)
        return torch.from_numpy(values[:count])
