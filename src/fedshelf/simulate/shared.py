"""Tensors in memory that processes share: files in the memory file system, used again when nobody needs them.

A file has one writer, the process that made it. Others map it and only read.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedshelf.storage.atomic_files import temporary_folder

MEMORY = Path("/dev/shm")  # noqa: S108  the folder below it is made by tempfile
PREFIX, LOCK = "fedshelf-shared-", "lock"
MOST_MAPPED = 4096  # files of other processes that one keeps mapped


@dataclass(frozen=True, slots=True)
class Reference:
    """Where a tensor's values lie: the file, and how to read it."""

    path: str
    capacity: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class SharedFolders:
    """Where shared files are made: in the memory file system, and on disk for when that is full (in containers it is
    often small). The process that starts the others makes these folders, and removes them with all files; if it is
    killed, the next one does: their lock is then free."""

    def __init__(self) -> None:
        parents: list[Path | None] = [MEMORY, None] if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) else [None]
        self._folders = [temporary_folder(PREFIX, parent) for parent in parents]
        self.paths = tuple(Path(folder.name) for folder in self._folders)
        self._locks = [_lock(path) for path in self.paths]
        for path in self.paths:
            _remove_abandoned(path.parent)

    def close(self) -> None:
        """Remove the files; mapped ones live on for those who hold them."""
        for folder in self._folders:
            folder.cleanup()
        for descriptor in self._locks:
            os.close(descriptor)


class SharedFiles:
    """The shared files that this process writes.

    Args:
        folders: where they are made: in the first that has room.
        name: what their names begin with: each process has its own.
    """

    def __init__(self, folders: Sequence[Path], name: str) -> None:
        self._folders = tuple(folders)
        self._name = name
        self._count = 0
        self._free: dict[int, deque[str]] = {}
        self._mapped: dict[str, mmap.mmap] = {}
        self._published: dict[int, Reference] = {}

    def write(self, tensor: Tensor) -> Reference:
        """Copy `tensor` to a file, which is taken until `release`.

        Raises:
            OSError: neither memory nor the disk has room for it.
        """
        num_bytes = tensor.numel() * tensor.element_size()
        capacity = _capacity(num_bytes)
        path = self._reserve(capacity)
        reference = Reference(path=path, capacity=capacity, dtype=tensor.dtype, shape=tuple(tensor.shape))
        _tensor_in(np.frombuffer(self._mapped[path], np.uint8), reference).copy_(tensor.detach())
        return reference

    def publish(self, tensor: Tensor) -> Reference:
        """As `write`, but the same tensor is written once, and its file is free when the tensor is garbage.

        Whoever reads the file needs the tensor to live until then; and nobody may change it.
        """
        reference = self._published.get(id(tensor))
        if reference is None:
            reference = self._published[id(tensor)] = self.write(tensor)
            weakref.finalize(tensor, self._withdraw, id(tensor)).atexit = False
        return reference

    def release(self, path: str, capacity: int) -> None:
        """Nobody needs the file's values any more."""
        self._free[capacity].append(path)

    def _withdraw(self, key: int) -> None:
        reference = self._published.pop(key)
        self.release(reference.path, reference.capacity)

    def _reserve(self, capacity: int) -> str:
        free = self._free.setdefault(capacity, deque())
        if free:
            return free.pop()
        self._count += 1
        for last, folder in enumerate(self._folders, start=1 - len(self._folders)):
            path = folder / f"{self._name}-{self._count}"
            try:
                _allocate(path, capacity)
                break
            except OSError as error:
                if error.errno != errno.ENOSPC or last == 0:
                    raise
        self._mapped[str(path)] = _map(str(path), capacity)
        return str(path)


class Mappings:
    """Files of other processes, as this one reads them."""

    def __init__(self) -> None:
        self._mapped: OrderedDict[str, mmap.mmap] = OrderedDict()

    def read(self, reference: Reference, done: Callable[[], object] | None = None) -> Tensor:
        """The tensor in the file, not copied; `done` is called when it and all views of it are garbage."""
        mapped = self._mapped.pop(reference.path, None)
        if mapped is None or len(mapped) != reference.capacity:
            mapped = _map(reference.path, reference.capacity)
        self._mapped[reference.path] = mapped
        if len(self._mapped) > MOST_MAPPED:
            self._mapped.popitem(last=False)
        values = np.frombuffer(mapped, np.uint8)  # the storage of whatever tensor is made of it keeps it alive
        if done is not None:
            weakref.finalize(values, done).atexit = False
        return _tensor_in(values, reference)


def _lock(folder: Path) -> int:
    """Hold a lock on `folder` for as long as this process, or one that it has forked, lives: the file descriptor."""
    unnamed = folder / "lock.new"  # the file has its name once it is locked
    descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    unnamed.rename(folder / LOCK)
    return descriptor


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of killed processes: nothing else would free that memory until the machine is restarted."""
    for lock in parent.glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError), lock.open("rb") as file:  # others' folders, or just being removed
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)


def _tensor_in(values: "np.ndarray[tuple[int], np.dtype[np.uint8]]", reference: Reference) -> Tensor:
    count = int(np.prod(reference.shape, dtype=np.int64))
    return torch.from_numpy(values).view(reference.dtype)[:count].view(reference.shape)


def _capacity(num_bytes: int) -> int:
    """Bytes of the file for `num_bytes`: four sizes per power of two, so that files of about a size fit each other."""
    step = max(4096, 1 << max(0, num_bytes.bit_length() - 3))
    return -(-max(num_bytes, 1) // step) * step


def _allocate(path: Path, capacity: int) -> None:
    """Make the file with all its pages: to run out of them later would be a bus error, not an exception."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, capacity)
        else:
            os.truncate(descriptor, capacity)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(descriptor)


def _map(path: str, capacity: int) -> mmap.mmap:
    with open(path, "r+b") as file:  # noqa: PTH123  called for every file
        return mmap.mmap(file.fileno(), capacity)
