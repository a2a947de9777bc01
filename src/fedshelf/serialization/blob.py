"""Vectors as bytes: a safetensors file, written from the vectors' own memory and read as views of the received bytes.

The header is written and parsed here rather than by the safetensors library, so that vectors are never copied: a body
is a list of pieces to send in order, and reading it needs no memory besides the bytes themselves.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import blake3
import torch
from torch import Tensor

from fedshelf.core.errors import RefusedError

Buffer: TypeAlias = bytes | bytearray | memoryview

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""Supported types, by the format's names."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 1 << 20
_LENGTH_BYTES = 8


@dataclass(frozen=True, eq=False)
class Blob:
    """A message's vectors, ready to send.

    Attributes:
        pieces: views of the vectors' memory; do not modify the vectors.
    """

    pieces: tuple[memoryview, ...]

    @cached_property
    def size(self) -> int:
        """Size in bytes."""
        return sum(len(piece) for piece in self.pieces)

    @cached_property
    def digest(self) -> str:
        """BLAKE3 digest of all pieces (hex), the blob's name."""
        hasher = Hasher()
        for piece in self.pieces:
            hasher.update(piece)
        return hasher.digest

    def join(self) -> bytes:
        """All pieces as one bytes object."""
        return b"".join(self.pieces)

    def chunks(self, start: int, size: int, stop: int | None = None) -> Iterator[memoryview]:
        """Yield the bytes from `start` to `stop`, without copying.

        Args:
            start: first byte.
            size: maximum size of a chunk.
            stop: end, exclusive; by default the end of the blob.
        """
        stop = self.size if stop is None else stop
        begin = 0
        for piece in self.pieces:
            for at in range(max(begin, start), min(begin + len(piece), stop), size):
                yield piece[at - begin : min(at - begin + size, stop - begin)]
            begin += len(piece)


class Hasher:
    """Incremental digest of a blob. BLAKE3 is as hard to forge as SHA-256, and runs at memory speed."""

    def __init__(self) -> None:
        self._hasher = blake3.blake3()

    def update(self, data: Buffer) -> None:
        """Add bytes."""
        self._hasher.update(data)

    @property
    def digest(self) -> str:
        """The digest so far (hex); empty if there were no bytes."""
        return self._hasher.hexdigest()


def digest(data: Buffer) -> str:
    """BLAKE3 digest of `data` (hex); empty for no data."""
    return blake3.blake3(data).hexdigest() if len(data) else ""


def write(vectors: Mapping[str, Tensor]) -> Blob:
    """The blob of `vectors` (each one-dimensional); without pieces if there are none."""
    if not vectors:
        return Blob(())
    arrays = {name: vector.detach().to("cpu").contiguous() for name, vector in _in_order(vectors).items()}
    pieces = [memoryview(_header(arrays))]
    pieces += [memoryview(array.view(torch.uint8).numpy().data) for array in arrays.values() if array.numel()]
    return Blob(tuple(pieces))


def size_of(vectors: Mapping[str, Tensor]) -> int:
    """Size in bytes of the blob that `write` would make."""
    if not vectors:
        return 0
    return len(_header(_in_order(vectors))) + sum(vector.numel() * vector.element_size() for vector in vectors.values())


def read(data: Buffer) -> dict[str, Tensor]:
    """The vectors of a blob, as views of `data` if it is writable, otherwise of a copy.

    Raises:
        RefusedError: not an output of `write`: truncated, another type or shape, or gaps between the vectors.
    """
    if not len(data):
        return {}
    memory = memoryview(data)
    if memory.readonly:
        memory = memoryview(bytearray(data))
    length = int.from_bytes(memory[:_LENGTH_BYTES], "little")
    if not len(memory) > _LENGTH_BYTES or not 0 < length <= min(len(memory) - _LENGTH_BYTES, MAX_HEADER_BYTES):
        raise RefusedError("the message's body is not a safetensors file: its header is truncated")
    entries = _entries(bytes(memory[_LENGTH_BYTES : _LENGTH_BYTES + length]))
    start = _LENGTH_BYTES + length
    vectors: dict[str, Tensor] = {}
    expected = 0
    for name, entry in entries.items():
        dtype, count, begin, end = _place(name, entry)
        if begin != expected or start + end > len(memory):
            raise RefusedError(
                f"vector {name!r} of the message's body does not lie where it should: truncated or altered"
            )
        if (start + begin) % dtype.itemsize:
            raise RefusedError(f"vector {name!r} of the message's body is not aligned to its type")
        vectors[name] = (
            torch.frombuffer(memory, dtype=dtype, count=count, offset=start + begin)
            if count
            else torch.empty(0, dtype=dtype)
        )
        expected = end
    if start + expected != len(memory):
        raise RefusedError(f"the message's body holds {len(memory) - start - expected:,} bytes too many")
    return vectors


def _in_order(vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sort wide types first, so that each vector is aligned; otherwise keep the order."""
    return dict(sorted(vectors.items(), key=lambda item: -item[1].element_size()))


def _header(vectors: Mapping[str, Tensor]) -> bytes:
    entries, offset = {}, 0
    for name, vector in vectors.items():
        end = offset + vector.numel() * vector.element_size()
        entries[name] = {"dtype": _NAMES[vector.dtype], "shape": list(vector.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _entries(text: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        raise RefusedError("the message's body is not a safetensors file: its header is not JSON") from None
    if not isinstance(entries, dict):
        raise RefusedError("the message's body is not a safetensors file: its header is not a JSON object")
    return entries


def _place(name: str, entry: object) -> tuple[torch.dtype, int, int, int]:
    """A vector's type, number of values, and start and end in the file's data."""
    match entry:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [int(begin), int(end)], **rest} if not rest:
            dtype = DTYPES.get(kind)
            if dtype is None or len(shape) != 1 or type(shape[0]) is not int or shape[0] < 0:
                kind = f"float{kind[1:]}" if kind.startswith("F") else kind
                raise RefusedError(f"vector {name!r} is {kind} of shape {tuple(shape)}, not a vector that may travel")
            if begin < 0 or end - begin != shape[0] * dtype.itemsize:
                raise RefusedError(f"vector {name!r} of {shape[0]:,} values cannot lie at {begin:,} to {end:,}")
            return dtype, shape[0], begin, end
    raise RefusedError(f"vector {name!r} of the message's body is not described as in a safetensors file")
