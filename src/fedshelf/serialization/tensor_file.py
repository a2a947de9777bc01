"""Safetensors files that know whether they are whole.

A file is an ordinary safetensors file; its metadata additionally hold a JSON object of ours and a CRC-32 over
everything else in the file. The checksum guards against accidents (a power cut before the pages reached the disk),
not against malice, and costs 0.25 s per GB.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
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
_MAX_HEADER_BYTES = 100 << 20  # the format's own limit
_BLOCK = 1 << 20


class DamagedFileError(Exception):
    """The file is truncated, altered or not ours. Internal: callers turn it into what it means to them."""


def tensor_chunks(tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> Iterator[bytes | memoryview]:
    """The bytes of a file that `read_tensors` reads, piece by piece."""
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
    checksum = zlib.crc32(_dump(entries))
    for tensor in tensors.values():
        checksum = zlib.crc32(_bytes(tensor), checksum)
    metadata["crc32"] = f"{checksum:08x}"
    header = _dump(entries)
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for tensor in tensors.values():
        yield _bytes(tensor)


def read_tensors(path: Path, *, verify: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, as views of the mapped file (nothing is read until it is used), and the JSON object.

    Writing to such a tensor changes neither the file nor what others see; it only costs memory.

    Args:
        verify: read the whole file and compare its checksum.

    Raises:
        DamagedFileError: the file is not what was written.
        FileNotFoundError: there is none.
    """
    if verify:
        _verify(path)
    try:
        with safe_open(path, framework="pt") as file:
            info = json.loads((file.metadata() or {})["fedshelf"])
            return {name: file.get_tensor(name) for name in file.keys()}, info  # noqa: SIM118 -- no mapping
    except (SafetensorError, KeyError, ValueError) as error:
        raise DamagedFileError(f"{path.name} is no file of ours: {error}") from error


def _verify(path: Path) -> None:
    with path.open("rb") as file:
        entries = _read_header(path, file)
        try:
            announced = entries["__metadata__"].pop("crc32")
        except (KeyError, TypeError, AttributeError) as error:
            raise DamagedFileError(f"{path.name} has no checksum") from error
        checksum = zlib.crc32(_dump(entries))
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    if announced != f"{checksum:08x}":
        raise DamagedFileError(f"{path.name} is damaged: its checksum differs")


def _read_header(path: Path, file: BinaryIO) -> dict[str, Any]:
    length = int.from_bytes(file.read(8), "little")
    try:
        entries = json.loads(file.read(min(length, _MAX_HEADER_BYTES)))
    except ValueError as error:
        raise DamagedFileError(f"{path.name} is truncated or damaged at its beginning") from error
    if not isinstance(entries, dict):
        raise DamagedFileError(f"{path.name} is no safetensors file")
    return entries


def _dump(entries: Mapping[str, Any]) -> bytes:
    return json.dumps(entries, separators=(",", ":")).encode()


def _bytes(tensor: Tensor) -> memoryview:
    """The values in logical order. Copies where the tensor is on a device or laid out in another order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")
