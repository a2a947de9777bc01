"""Vectors in memory that processes share: files in the memory file system, recycled when nobody holds them.

Shapes: n values of a vector.
"""

import os
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor


class SharedVectors:
    """Float32 vectors in files below one temporary folder.

    A file is used again once the tensor that `put` was given, or that `make` returned, is garbage: keep that very
    object for as long as its values matter.
    """

    def __init__(self) -> None:
        memory = Path("/dev/shm")  # noqa: S108  the folder below it is made by tempfile
        usable = memory.is_dir() and os.access(memory, os.W_OK)
        self._folder = tempfile.TemporaryDirectory(prefix="fedshelf-", dir=memory if usable else None)
        self._free: dict[int, list[str]] = {}
        self._published: dict[int, str] = {}
        self._count = 0

    def put(self, vector: Tensor) -> str:
        """The path of a file with the values of `vector` [n]; the same tensor is written once."""
        path = self._published.get(id(vector))
        if path is None:
            path = self._take(vector.numel())
            open_vector(path, vector.numel()).copy_(vector)
            self._published[id(vector)] = path
            weakref.finalize(vector, self._withdraw, id(vector), path, vector.numel())
        return path

    def make(self, size: int) -> tuple[str, Tensor]:
        """A file for `size` values, and the tensor that shows them."""
        path = self._take(size)
        vector = open_vector(path, size)
        weakref.finalize(vector, self._give_back, path, size)
        return path, vector

    def close(self) -> None:
        """Remove the files; mapped ones live on for those who hold them."""
        self._folder.cleanup()

    def _take(self, size: int) -> str:
        free = self._free.setdefault(size, [])
        if free:
            return free.pop()
        self._count += 1
        path = Path(self._folder.name) / f"{self._count}"
        with path.open("wb") as file:
            file.truncate(4 * size)
        return str(path)

    def _withdraw(self, key: int, path: str, size: int) -> None:
        del self._published[key]
        self._give_back(path, size)

    def _give_back(self, path: str, size: int) -> None:
        self._free[size].append(path)


def open_vector(path: str, size: int) -> Tensor:
    """The `size` values in the file, shared with everyone who opens it."""
    return torch.from_file(path, shared=True, size=size, dtype=torch.float32)
