"""Safetensors files with a checksum.

A file is a regular safetensors file; its metadata also hold a JSON object and a CRC-32 over everything else in the
file. The checksum protects against accidents (a power cut before the pages reached the disk), not against malice, and
costs 0.25 s per GB.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_MAX_HEADER_BYTES = 100 << 20  # the format's limit
_BLOCK = 1 << 20


def tensor_chunks(tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a file that `read_tensors` reads.

    Args:
        tensors: tensors by name.
        info: the JSON object.
    """
    metadata = {"format": "pt", "fedshelf": json.dumps(info)}
    entries: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    checksum = zlib.crc32(dump_header(entries))
    for tensor in tensors.values():
        checksum = zlib.crc32(_bytes(tensor), checksum)
    metadata["crc32"] = f"{checksum:08x}"
    header = dump_header(entries)
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for tensor in tensors.values():
        yield _bytes(tensor)


def dump_header(entries: Mapping[str, Any]) -> bytes:
    """The header of a tensor file as compact JSON, which its checksum covers."""
    return json.dumps(entries, separators=(",", ":")).encode()


def _bytes(tensor: Tensor) -> memoryview:
    """The values in logical order, copied if the tensor is on a device or not contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")
