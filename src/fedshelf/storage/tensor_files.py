"""Tensor files: written atomically, read as views of the mapped file, verified by checksum."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedshelf.serialization.tensor_file import dump_header, tensor_chunks
from fedshelf.storage.atomic_files import write_atomically

_MAX_HEADER_BYTES = 100 << 20  # the format's limit
_BLOCK = 1 << 20


class DamagedFileError(Exception):
    """The file is truncated, altered or of another format. Internal: callers convert it to their own error."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any], *, durable: bool = True) -> None:
    """Write named tensors and a JSON object as one file, atomically. At most one tensor is copied at a time.

    Args:
        path: the file.
        tensors: tensors by name.
        info: the JSON object.
        durable: see `write_atomically`.

    Raises:
        RunError: see `write_atomically`.
    """
    write_atomically(path, tensor_chunks(tensors, info), durable=durable)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a tensor file. The tensors are views of the mapped file, read on first use.

    Writes to the tensors stay private to this process.

    Args:
        path: the file.

    Returns:
        The tensors and the JSON object.

    Raises:
        DamagedFileError: the file is not what was written.
        FileNotFoundError: there is no file.
    """
    _verify(path)
    try:
        with safe_open(path, framework="pt") as file:
            info = json.loads((file.metadata() or {})["fedshelf"])
            return {name: file.get_tensor(name) for name in file.keys()}, info  # noqa: SIM118 -- no mapping
    except (SafetensorError, KeyError, ValueError) as error:
        raise DamagedFileError(f"{path.name} was not written by FedShelf: {error}") from error


def _verify(path: Path) -> None:
    with path.open("rb") as file:
        entries = _read_header(path, file)
        try:
            announced = entries["__metadata__"].pop("crc32")
        except (KeyError, TypeError, AttributeError) as error:
            raise DamagedFileError(f"{path.name} has no checksum") from error
        checksum = zlib.crc32(dump_header(entries))
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
