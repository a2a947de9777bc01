"""Files and folders that only their owner can read, whatever the umask, and that are never reached through a link.

Writes are atomic: after a crash or power cut, a file has its old or its new content, never a mix. Every file that
FedShelf writes in a run, a state directory, a cache or its home is made here, with mode 0600, in folders of mode 0700.
"""

import contextlib
import errno
import mmap
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from fedshelf.core.errors import RunError
from fedshelf.core.system_errors import current_user, reason

Data: TypeAlias = bytes | str | Iterable[bytes | memoryview]
"""Content of a file. Text is written as UTF-8, an iterable is streamed."""

LEFTOVER = ".tmp"
"""Suffix of temporary files."""

_ADVICE = {
    errno.ENOSPC: "Free some space on that disk; what was saved before is still whole.",
    errno.EDQUOT: "Your disk quota is used up: free some space; what was saved before is still whole.",
    errno.EFBIG: "That disk, or a limit on this process (ulimit -f), takes no file of this size: lift it.",
    errno.EROFS: "That disk is mounted read-only: choose a folder that can be written to.",
    errno.EACCES: "Give yourself the right to write there, or choose another folder.",
    errno.EPERM: "Give yourself the right to write there, or choose another folder.",
    errno.ENOTDIR: "A file stands where a folder is needed: move it away, or choose another folder.",
    errno.EISDIR: "A folder stands where a file is needed: name a file in it, or choose another place.",
    errno.EEXIST: "A file stands where a folder is needed: move it away, or choose another folder.",
    errno.ELOOP: "FedShelf does not write through symbolic links: remove it, and start again.",
}
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})


def disk_advice(error: OSError) -> str:
    """Say what to do if a disk is full or read-only, for whatever user and purpose; empty for other errors."""
    return _ADVICE[error.errno] if error.errno in _DISK else ""


def write_atomically(path: Path, data: Data, *, durable: bool = True, mode: int = 0o600) -> None:
    """Create or replace the file at `path`.

    The data is written to a temporary file in the same folder, fsynced and renamed; then the folder is fsynced.

    Args:
        path: the file.
        data: its new content.
        durable: False skips both fsyncs. The file still survives the death of the process, but a power cut may damage
            it, so its reader must be able to detect that.
        mode: the file's permissions, less those that the process's umask denies.

    Raises:
        RunError: the disk is full, the folder read-only, ...; the old file is unchanged.
    """
    write_together({path: data}, durable=durable, mode=mode)


def write_together(files: Mapping[Path, Data], *, durable: bool = True, mode: int = 0o600) -> None:
    """Replace several files, in order, with nothing but renames between the first and the last.

    A crash between the renames can leave new files next to old ones: let the last file identify the content of the
    others.

    Args:
        files: new content by path.
        durable: see `write_atomically`.
        mode: see `write_atomically`.

    Raises:
        RunError: see `write_atomically`; if one of the files cannot be written, none is replaced.
    """
    staged: dict[Path, Path] = {}
    try:
        for path, data in files.items():
            with translating_os_errors("write", path):
                staged[path] = _stage(path, data, durable=durable, mode=mode)
        for path in list(staged):
            with translating_os_errors("write", path):
                staged[path].replace(path)
            del staged[path]
    finally:
        for leftover in staged.values():
            leftover.unlink(missing_ok=True)
    if durable:
        for folder in {path.parent for path in files}:
            with translating_os_errors("write", folder):
                sync_folder(folder)


def make_folder(path: Path) -> Path:
    """Create a folder and its missing parents, each with mode 0700. An existing folder keeps its mode.

    Returns:
        The folder.

    Raises:
        RunError: it cannot be created.
    """
    with translating_os_errors("make folder", path):
        make_private_folder(path)
    return path


def make_own_folder(path: Path) -> Path:
    """Like `make_folder`, for a folder that FedShelf names itself: it must not be a symbolic link.

    Raises:
        RunError: it cannot be created, or is a link.
    """
    refuse_link(path)
    return make_folder(path)


def refuse_link(path: Path) -> None:
    """Raise an error if `path` is a symbolic link: what is written or deleted there may be someone else's.

    Raises:
        RunError: it is a link, or cannot be inspected.
    """
    with translating_os_errors("use", path):
        if path.is_symlink():
            raise OSError(errno.ELOOP, "it is a symbolic link")


def make_private_folder(path: Path) -> None:
    """Like `make_folder`, but raise the system's error."""
    for folder in reversed([folder for folder in (path, *path.parents) if not folder.exists()]):
        folder.mkdir(mode=0o700, exist_ok=True)
    path.mkdir(exist_ok=True)  # an error if it is a file


def open_private(path: Path, flags: int, mode: int = 0o600) -> int:
    """Open a file that is not a symbolic link.

    Args:
        path: the file.
        flags: those of `os.open`.
        mode: its permissions if it is created.

    Returns:
        The file descriptor.

    Raises:
        OSError: the file cannot be opened, or is a link.
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode)


def temporary_folder(prefix: str, parent: Path | None = None) -> "tempfile.TemporaryDirectory[str]":
    """Create a folder that is deleted when it is closed, or at the end of the process.

    Args:
        prefix: prefix of its name.
        parent: its parent; by default the system's folder for temporary files.

    Raises:
        RunError: it cannot be created.
    """
    try:
        return tempfile.TemporaryDirectory(prefix=prefix, dir=parent)
    except OSError as error:
        raise RunError(
            f"{current_user()} cannot make a temporary folder ({reason(error)}): set the environment variable TMPDIR "
            "to a folder that can be written to"
        ) from error


def map_file(path: Path) -> memoryview:
    """Map a file into memory. Bytes are read on first use, and stay available after the file is deleted.

    Writes to the map stay private to this process.

    Raises:
        RunError: the file cannot be read.
    """
    with translating_os_errors("read", path), path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of a killed process. Only the single process that writes to `folder` may call this."""
    for path in folder.glob(f".*{LEFTOVER}"):
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def translating_os_errors(action: str, path: Path) -> Iterator[None]:
    """Convert system errors to a `RunError` that says what failed, where, why, and what to do."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "Check that disk, or choose another folder.")
        raise RunError(f"cannot {action} '{path}': {error.strerror or error}. {advice}") from error


def _stage(path: Path, data: Data, *, durable: bool, mode: int) -> Path:
    """Write `data` to a temporary file next to `path`."""
    temporary = path.with_name(f".{path.name[:150]}.{secrets.token_hex(4)}{LEFTOVER}")
    chunks: Iterable[bytes | memoryview]
    chunks = [data.encode()] if isinstance(data, str) else [data] if isinstance(data, bytes) else data
    try:
        descriptor = open_private(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            for chunk in chunks:
                _write_all(descriptor, chunk)
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _write_all(descriptor: int, chunk: bytes | memoryview) -> None:
    rest = memoryview(chunk).cast("B")
    while rest:  # Linux writes at most 2 GiB per call
        rest = rest[os.write(descriptor, rest) :]


def sync_folder(folder: Path) -> None:
    """Make what was created in a folder, or renamed, durable.

    Raises:
        OSError: the folder cannot be synced.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
