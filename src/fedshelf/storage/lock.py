"""A lock that distinguishes a live run from a dead one.

The kernel holds the lock (flock) while the process lives, and releases it however the process ends. The file's text
only identifies the owner, so a file left behind by `kill -9` does not block anything.
"""

import contextlib
import fcntl
import os
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import psutil

from fedshelf.core.errors import RunError
from fedshelf.storage.atomic_files import open_private, translating_os_errors

PATIENCE = 0.5
"""Seconds to retry: a process that only checks whether the run is alive holds the lock for a moment."""


class RunLock:
    """The exclusive right to write to a run directory (or a client's), until `release` or the end of the process.

    Args:
        path: the lock file.
        what: what only one process may run at a time, for the error message; by default, the run in the file's
            folder.
        instead: what to do if it is locked, for the error message.
    """

    def __init__(self, path: Path, *, what: str = "", instead: str = "choose another --run-dir") -> None:
        """Acquire the lock.

        Raises:
            RunError: another process holds it (the message has its id), or the file cannot be written.
        """
        self._path = path
        self._what = what or f"the run in '{path.parent}'"
        self._instead = instead
        with translating_os_errors("write", path):
            self._descriptor = open_private(path, os.O_RDWR | os.O_CREAT)
        try:
            self._acquire()
            with translating_os_errors("write", path):
                os.ftruncate(self._descriptor, 0)
                os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        except BaseException:
            os.close(self._descriptor)
            raise
        _held.add(self)

    def _acquire(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self._try():
            if time.monotonic() >= deadline:
                process = _read_pid(self._descriptor)
                raise RunError(
                    f"{self._what} is in use by process {process or 'unknown'}: stop that process, or {self._instead}"
                )
            time.sleep(0.02)

    def _try(self) -> bool:
        with translating_os_errors("lock", self._path):
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def release(self) -> None:
        """Release the lock. A second call does nothing."""
        if self in _held:
            _held.discard(self)
            os.close(self._descriptor)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` for a short change, after waiting for other processes and threads.

    Raises:
        RunError: the file cannot be written.
    """
    with translating_os_errors("lock", path):
        descriptor = open_private(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except BaseException:
            os.close(descriptor)
            raise
    try:
        yield
    finally:
        os.close(descriptor)


def owner(path: Path) -> int | None:
    """The id of the process that holds the lock at `path` (0 if not written yet), or None if it is free."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would block
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_pid(descriptor) or 0
    except OSError:  # a file system without locks: no process can hold one
        return None
    finally:
        os.close(descriptor)
    return None


def holder(path: Path) -> psutil.Process | None:
    """The process that holds the lock at `path`, or None if it is free.

    The file's text is not proof: its process may be dead, and the id may be reused. Only a process that has the file
    open is returned.

    Raises:
        RunError: the lock is held by a process that cannot be inspected.
    """
    deadline = time.monotonic() + PATIENCE
    while (pid := owner(path)) is not None:
        where = "it is not on this machine, so stop it on the one where it runs"
        try:
            process = psutil.Process(pid)
            if pid and any(path.samefile(file.path) for file in process.open_files()):
                return process
        except psutil.AccessDenied:
            where = "it belongs to another user, so stop it as that user"
        except (psutil.NoSuchProcess, OSError):
            pass
        if time.monotonic() >= deadline:
            raise RunError(f"'{path}' is locked by process {pid or 'unknown'}, which cannot be seen here: {where}")
        time.sleep(0.02)
    return None


def _read_pid(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0).strip()
    return int(text) if text.isdigit() else None


_held: "weakref.WeakSet[RunLock]" = weakref.WeakSet()


def _release_in_child() -> None:
    """Close the lock in forked workers, which would otherwise keep it after the parent's death."""
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_release_in_child)
