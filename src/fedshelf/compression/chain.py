"""A chain of codecs: which values are sent, in how many bits, and how they are packed.

    encode:                                              decode:
     1  i, index parts <- sparsifier(x)                   5  parts <- lossless, each of exactly its length
     2  v <- x_i (all of x without a sparsifier)          6  every part has its type and length, or is refused
     3  value parts <- quantizer(v)                       7  v <- quantizer, i <- sparsifier
     4  parts <- lossless(index and value parts)          8  x̂ <- 0 but x̂_i = v

`encode` is a function of (vector, seeds): the same bits for any number of threads. `decode` needs only the parts, and
gives the same bits on every machine. It does not trust its input: anything that an honest encoder would not write
raises RefusedError, before memory is allocated for claimed sizes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedshelf.compression.grammar import parse_stages
from fedshelf.compression.stage import (
    MAX_MAGNITUDE,
    Codec,
    Floats,
    Lossless,
    Parts,
    Properties,
    Quantizer,
    Sparsifier,
    Specs,
)
from fedshelf.core.encoded import Encoded
from fedshelf.core.errors import FedShelfError, RefusedError, UsageError
from fedshelf.core.rng import Rng

MAX_SIZE = 2**31 - 1
"""The maximum length of a vector. Callers that know the model pass its size to `decode`, which is the effective bound.
"""


@dataclass(frozen=True, slots=True)
class Chain:
    """At most one sparsifier, one quantizer (which may be float32), and at most one lossless stage.

    Attributes:
        sparsifier: selects the values to send; None: all.
        quantizer: encodes the values.
        lossless: compresses the parts; None: no compression.
    """

    sparsifier: Sparsifier | None
    quantizer: Quantizer
    lossless: Lossless | None

    def __str__(self) -> str:
        """The canonical text: `parse` restores this chain from it, and equal chains have equal texts."""
        return "+".join(stage.text for stage in self._stages if stage.text) or "none"

    @property
    def _stages(self) -> list[Codec]:
        return [stage for stage in (self.sparsifier, self.quantizer, self.lossless) if stage is not None]

    @property
    def properties(self) -> Properties:
        """The properties of all stages combined."""
        combined = Properties(lossless=True, unbiased=True, linear=True)
        for stage in self._stages:
            combined &= stage.properties
        return combined

    def num_bytes(self, size: int) -> int:
        """Size of the parts for `size` values in bytes: exact without a lossless stage, an upper bound with one."""
        return sum(dtype.itemsize * length for dtype, length in self._specs(size).values())

    def _specs(self, size: int) -> Specs:
        if self.sparsifier is None:
            return self.quantizer.specs(size)
        return self.sparsifier.specs(size) | self.quantizer.specs(self.sparsifier.count(size))

    def encode(self, vector: Tensor, *, seed: int, support_seed: int | None = None) -> Encoded:
        """Encode `vector` [n].

        Args:
            vector: float32, on the CPU, finite; not modified.
            seed: for rounding and rotation; must differ between clients and rounds, so that their errors average
                out.
            support_seed: for randk's choice; must be the same for all clients of a round if codes are summed. By
                default `seed`.

        Raises:
            FedShelfError: values are not finite, or out of this chain's range.
        """
        values = checked(vector, exact=self.properties.lossless)
        parts: Parts = {}
        if self.sparsifier is not None:
            chosen = seed if support_seed is None else support_seed
            indices, parts = self.sparsifier.select(values, Rng(chosen).fork(purpose="support").seed)
            values = values[indices]
        parts |= self.quantizer.encode(values, Rng(seed).fork(purpose="quantizer").seed)
        if self.lossless is not None:
            parts = self.lossless.compress(parts)
        return Encoded(codec=str(self), size=vector.numel(), parts=parts)

    def decode(self, encoded: Encoded, *, size: int | None = None) -> Tensor:
        """Decode a vector [n].

        Args:
            encoded: from any source, untrusted.
            size: the expected n. Without it the claimed size is used, and a sparse code of few bytes may claim a
                long vector.

        Raises:
            RefusedError: anything that `encode` would not have written.
        """
        self._check_claims(encoded, size)
        count = encoded.size if self.sparsifier is None else self.sparsifier.count(encoded.size)
        specs = self._specs(encoded.size)
        parts = {name: _plain(name, part) for name, part in encoded.parts.items()}
        if self.lossless is not None:
            parts = self.lossless.decompress(parts, specs)
        _check_parts(parts, specs)
        if self.sparsifier is None:
            return torch.from_numpy(self.quantizer.decode(parts, count))
        indices = self.sparsifier.indices(parts, encoded.size)
        values = self.quantizer.decode(parts, count)
        decoded = np.zeros(encoded.size, np.float32)
        decoded[indices] = values
        return torch.from_numpy(decoded)

    def _check_claims(self, encoded: Encoded, size: int | None) -> None:
        if encoded.codec != str(self):
            raise RefusedError(f"a vector encoded as {_shown(encoded.codec)} arrived where {str(self)!r} was expected")
        if type(encoded.size) is not int or not 0 <= encoded.size <= MAX_SIZE:
            raise RefusedError(f"an encoded vector cannot have {_shown(encoded.size)} values")
        if size is not None and encoded.size != size:
            raise RefusedError(f"the encoded vector has {encoded.size:,} values, the model {size:,}")


def parse(text: str) -> Chain:
    """Parse a chain such as ``topk:0.01+int8+zstd``.

    Raises:
        UsageError: lists all problems, with suggestions.
    """
    return Chain(*parse_stages(text))


def decode(encoded: Encoded, *, size: int | None = None, allowed: Sequence[Chain] | None = None) -> Tensor:
    """Decode a vector by the codec that it names.

    Args:
        encoded: from any source, untrusted.
        size: the expected number of values; pass it if it is known (see `Chain.decode`).
        allowed: chains that the receiver accepts; None: all.

    Raises:
        RefusedError: an unknown or disallowed codec, or anything that its `encode` would not have written.
    """
    try:
        chain = parse(encoded.codec)
    except (UsageError, AttributeError, TypeError):
        raise RefusedError(
            f"the codec {_shown(encoded.codec)} is unknown: the other side runs another version"
        ) from None
    if allowed is not None and chain not in allowed:
        choices = ", ".join(map(str, allowed)) or "none at all"
        raise RefusedError(f"the codec {str(chain)!r} is not allowed in this run, which takes {choices}")
    return chain.decode(encoded, size=size)


def checked(vector: Tensor, *, exact: bool) -> Floats:
    """Validate `vector` [n] for encoding, and return its values.

    Args:
        vector: the vector.
        exact: whether the chain does no arithmetic on values, so that their magnitude does not matter.

    Raises:
        FedShelfError: not a float32 vector on the CPU, not finite, or too large for arithmetic.
    """
    if vector.dim() != 1 or vector.dtype != torch.float32 or vector.device.type != "cpu":
        raise FedShelfError(
            f"only float32 vectors on the CPU are encoded, not {vector.dtype} of shape {tuple(vector.shape)} "
            f"on {vector.device}"
        )
    vector = vector.detach().contiguous()
    if vector.numel():
        least, most = (float(end) for end in torch.aminmax(vector))
        largest = max(-least, most)
        if not np.isfinite(largest):
            raise FedShelfError("the vector to encode holds values that are not finite: training has diverged")
        if largest > MAX_MAGNITUDE and not exact:
            raise FedShelfError(
                f"the vector to encode reaches {largest:.3g}, beyond ±{MAX_MAGNITUDE:.3g}: training has diverged"
            )
    return np.asarray(vector.numpy())


def _plain(name: str, part: Tensor) -> Tensor:
    if not isinstance(part, Tensor) or part.layout is not torch.strided or part.device.type != "cpu" or part.dim() != 1:
        raise RefusedError(f"the encoded vector's part {_shown(name)} is not one-dimensional")
    return part.detach().contiguous()


def _check_parts(parts: Mapping[str, Tensor], specs: Specs) -> None:
    if parts.keys() != specs.keys():
        raise RefusedError(f"the encoded vector holds {sorted(map(_shown, parts))} instead of {sorted(specs)}")
    for name, (dtype, length) in specs.items():
        part = parts[name]
        if part.dtype != dtype or part.numel() != length:
            raise RefusedError(
                f"the encoded vector's part {name!r} has {part.numel():,} values of {part.dtype}; "
                f"{length:,} of {dtype} are due"
            )


def _shown(value: object) -> str:
    """Shorten an untrusted value for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
