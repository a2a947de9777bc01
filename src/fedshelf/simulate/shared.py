"""Tensors in shared memory: files in the memory file system, reused when no process needs them.

Only the process that created a file writes to it. Others map it read-only.
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

from fedshelf.storage.atomic_files import open_private, temporary_folder

MEMORY = Path("/dev/shm")  # noqa: S108  the folder below it is created by tempfile
PREFIX, LOCK = "fedshelf-shared-", "lock"
MOST_MAPPED = 4096  # maximum mapped files of other processes


@dataclass(frozen=True, slots=True)
class Reference:
    """A tensor in a shared file.

    Attributes:
        path: the file.
        capacity: the file's size in bytes.
        dtype: the tensor's type.
        shape: the tensor's shape.
    """

    path: str
    capacity: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class SharedFolders:
    """The folders for shared files: in the memory file system, and on disk for when that is full.

    The memory file system is often small in containers.

    The parent process creates these folders and removes them with all files. If it is killed, the next one does so,
    because their lock is then free.
    """

    def __init__(self) -> None:
        parents: list[Path | None] = [MEMORY, None] if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) else [None]
        self._folders = [temporary_folder(PREFIX, parent) for parent in parents]
        self.paths = tuple(Path(folder.name) for folder in self._folders)
        self._locks = [_lock(path) for path in self.paths]
        for path in self.paths:
            _remove_abandoned(path.parent)

    def close(self) -> None:
        """Remove the files; mapped ones stay valid for their users."""
        for folder in self._folders:
            folder.cleanup()
        for descriptor in self._locks:
            os.close(descriptor)


class SharedFiles:
    """The shared files that this process writes.

    Args:
        folders: where to create files; the first one with free space is used.
        name: prefix of the file names, unique to this process.
    """

    def __init__(self, folders: Sequence[Path], name: str) -> None:
        self._folders = tuple(folders)
        self._name = name
        self._count = 0
        self._free: dict[int, deque[str]] = {}
        self._mapped: dict[str, mmap.mmap] = {}
        self._published: dict[int, Reference] = {}

    def write(self, tensor: Tensor) -> Reference:
        """Copy a tensor to a file, which is in use until `release`.

        Args:
            tensor: the tensor.

        Returns:
            Where it is stored.

        Raises:
            OSError: neither memory nor disk has space.
        """
        num_bytes = tensor.numel() * tensor.element_size()
        capacity = _capacity(num_bytes)
        path = self._reserve(capacity)
        reference = Reference(path=path, capacity=capacity, dtype=tensor.dtype, shape=tuple(tensor.shape))
        _tensor_in(np.frombuffer(self._mapped[path], np.uint8), reference).copy_(tensor.detach())
        return reference

    def publish(self, tensor: Tensor) -> Reference:
        """Like `write`, but write the same tensor only once, and free its file when the tensor is garbage collected.

        The tensor must stay alive until all readers are done and must not be modified.
        """
        reference = self._published.get(id(tensor))
        if reference is None:
            reference = self._published[id(tensor)] = self.write(tensor)
            weakref.finalize(tensor, self._withdraw, id(tensor)).atexit = False
        return reference

    def release(self, path: str, capacity: int) -> None:
        """Free a file whose content is no longer needed."""
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
    """Files of other processes, mapped by this one."""

    def __init__(self) -> None:
        self._mapped: OrderedDict[str, mmap.mmap] = OrderedDict()

    def read(self, reference: Reference, done: Callable[[], object] | None = None) -> Tensor:
        """Map a tensor without copying it.

        Args:
            reference: where it is stored.
            done: called when the tensor and all its views are garbage collected.

        Returns:
            The tensor.
        """
        mapped = self._mapped.pop(reference.path, None)
        if mapped is None or len(mapped) != reference.capacity:
            mapped = _map(reference.path, reference.capacity)
        self._mapped[reference.path] = mapped
        if len(self._mapped) > MOST_MAPPED:
            self._mapped.popitem(last=False)
        values = np.frombuffer(mapped, np.uint8)  # kept alive by the storage of any tensor created from it
        if done is not None:
            weakref.finalize(values, done).atexit = False
        return _tensor_in(values, reference)


def _lock(folder: Path) -> int:
    """Lock `folder` until this process and all its forks end; return the file descriptor."""
    unnamed = folder / "lock.new"  # renamed once it is locked
    descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    unnamed.rename(folder / LOCK)
    return descriptor


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of killed processes; otherwise their memory stays allocated until the machine restarts."""
    for lock in parent.glob(f"{PREFIX}*/{LOCK}"):
        with (  # OSError: in use by others, just being removed, or not made by FedShelf
            contextlib.suppress(OSError), os.fdopen(open_private(lock, os.O_RDONLY | os.O_NONBLOCK), "rb") as file,
        ):  # fmt: skip
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)


def _tensor_in(values: "np.ndarray[tuple[int], np.dtype[np.uint8]]", reference: Reference) -> Tensor:
    count = int(np.prod(reference.shape, dtype=np.int64))
    return torch.from_numpy(values).view(reference.dtype)[:count].view(reference.shape)


def _capacity(num_bytes: int) -> int:
    """Round a file size up to one of four sizes per power of two, so that similar files are interchangeable."""
    step = max(4096, 1 << max(0, num_bytes.bit_length() - 3))
    return -(-max(num_bytes, 1) // step) * step


def _allocate(path: Path, capacity: int) -> None:
    """Create the file with all its pages: running out of them later would cause a bus error instead of an exception."""
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
