"""zstd: lossless coding of the parts' bytes. Collet & Kucherawy 2021, RFC 8878 "Zstandard Compression".

    for each part:
     1  bytes of the same significance are grouped (first all lowest bytes, ... , then all highest)
     2  frame <- zstd(bytes)
     3  the part is replaced by `<name>.zst` if the frame is shorter, else kept as it is

Line 1 helps if numbers are wider than a byte: signs and exponents of neighbors repeat, mantissas do not. One frame per
part, since codes, scales and indices have different statistics.

Differs from the paper: nothing. A frame without a content size, with a size other than the part's, or with trailing
data is refused before any byte is decompressed, so a decompression bomb allocates nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor

from fedshelf.compression.stage import Parts, Properties, Specs
from fedshelf.core.errors import RefusedError
from fedshelf.core.settings import Setting

DEFAULT_LEVEL = 3
SUFFIX = ".zst"


@dataclass(frozen=True, slots=True)
class Zstd:
    """zstd compression.

    Attributes:
        level: from 1 (fast) to 19; higher ones need windows that a small machine may not have.
    """

    level: Annotated[int, Setting(key="LEVEL", help="1 (fast) to 19", ge=1, le=19)] = DEFAULT_LEVEL

    @property
    def text(self) -> str:
        return "zstd" if self.level == DEFAULT_LEVEL else f"zstd:{self.level}"

    @property
    def properties(self) -> Properties:
        return Properties(lossless=True, unbiased=True)  # but frames cannot be added

    def compress(self, parts: Parts) -> Parts:
        compressor = zstandard.ZstdCompressor(level=self.level)
        compressed: Parts = {}
        for name, part in parts.items():
            frame = compressor.compress(_shuffle(part).data) if part.numel() else b""
            if 0 < len(frame) < part.numel() * part.element_size():
                compressed[name + SUFFIX] = torch.from_numpy(np.frombuffer(frame, np.uint8).copy())
            else:
                compressed[name] = part
        return compressed

    def decompress(self, parts: Mapping[str, Tensor], specs: Specs) -> Parts:
        decompressed: Parts = {}
        for name, part in parts.items():
            inner = name.removesuffix(SUFFIX)
            if inner in decompressed:
                raise RefusedError(f"the encoded vector holds {inner!r} twice, compressed and not")
            if inner == name or inner not in specs:
                decompressed[name] = part  # checked by the chain, like any part
                continue
            dtype, length = specs[inner]
            decompressed[inner] = _decompress(inner, part, dtype, length)
        return decompressed


def _decompress(name: str, frame: Tensor, dtype: torch.dtype, length: int) -> Tensor:
    """The part of `length` numbers in `frame`; memory is allocated only if the frame declares exactly that length."""
    if frame.dtype != torch.uint8 or length == 0:  # an empty part is never shorter when compressed
        raise RefusedError(f"the encoded vector's part {name!r} is not a compressed one")
    expected = length * dtype.itemsize
    data = frame.numpy().data
    try:
        stated = zstandard.get_frame_parameters(data).content_size
        if stated != expected:
            raise RefusedError(f"the encoded vector's part {name!r} has another length than its vector needs")
        raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=expected, allow_extra_data=False)
    except (zstandard.ZstdError, ValueError) as error:
        raise RefusedError(f"the encoded vector's part {name!r} cannot be decompressed: {error}") from None
    if len(raw) != expected:
        raise RefusedError(f"the encoded vector's part {name!r} is truncated")
    planes = np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, length)
    return torch.from_numpy(planes.T.reshape(-1).copy()).view(dtype)


def _shuffle(part: Tensor) -> NDArray[np.uint8]:
    planes = part.contiguous().view(torch.uint8).numpy().reshape(part.numel(), part.element_size()).T
    return np.ascontiguousarray(planes).reshape(-1)
