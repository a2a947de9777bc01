"""Files that are either the old or the new, never a mix, whenever the power goes."""

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
"""What a file may be made of; text is written as UTF-8, an iterable is streamed."""

LEFTOVER = ".tmp"
"""How the name of a file that was never finished ends."""

_ADVICE = {
    errno.ENOSPC: "Free some space on that disk and start again; what was saved before is still whole.",
    errno.EDQUOT: "Your disk quota is used up: free some space and start again; what was saved before is still whole.",
    errno.EFBIG: "That disk, or a limit on this process (ulimit -f), takes no such big file: lift it and start again.",
    errno.EROFS: "That disk is mounted read-only: choose a folder that can be written to.",
    errno.EACCES: "Give yourself the right to write there, or choose another folder.",
    errno.EPERM: "Give yourself the right to write there, or choose another folder.",
    errno.ENOTDIR: "A file stands where a folder is needed: move it away, or choose another folder.",
    errno.EEXIST: "A file stands where a folder is needed: move it away, or choose another folder.",
}


def write_atomically(path: Path, data: Data, *, durable: bool = True) -> None:
    """Replace the file at `path`, or make it.

    The data goes to a temporary name in the same folder, is fsynced and renamed; then the folder is fsynced.

    Args:
        durable: False leaves out both fsyncs. The file still survives the death of the process, but a power cut may
            leave it damaged: its reader must be able to tell.

    Raises:
        RunError: the disk is full, the folder read-only, ...; the old file is untouched.
    """
    write_together({path: data}, durable=durable)


def write_together(files: Mapping[Path, Data], *, durable: bool = True) -> None:
    """Replace several files, in order, with nothing but renames between the first and the last.

    A crash in that moment can still leave new files beside old ones: let the last file say what the others must be.

    Raises:
        RunError: as `write_atomically`; if one of the files cannot be written, none is replaced.
    """
    staged: dict[Path, Path] = {}
    try:
        for path, data in files.items():
            with saying_what_to_do("write", path):
                staged[path] = _stage(path, data, durable=durable)
        for path in list(staged):
            with saying_what_to_do("write", path):
                staged[path].replace(path)
            del staged[path]
    finally:
        for leftover in staged.values():
            leftover.unlink(missing_ok=True)
    if durable:
        for folder in {path.parent for path in files}:
            with saying_what_to_do("write", folder):
                _sync_folder(folder)


def make_folder(path: Path) -> Path:
    """Make a folder and those above it where they are missing.

    Raises:
        RunError: it cannot be made.
    """
    with saying_what_to_do("make folder", path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def temporary_folder(prefix: str, parent: Path | None = None) -> "tempfile.TemporaryDirectory[str]":
    """Make a folder that is deleted when it is closed, or at the end of the process.

    Args:
        prefix: how its name begins.
        parent: where it goes; by default where the system keeps temporary files.

    Raises:
        RunError: there is no place for one.
    """
    try:
        return tempfile.TemporaryDirectory(prefix=prefix, dir=parent)
    except OSError as error:
        raise RunError(
            f"{current_user()} cannot make a temporary folder ({reason(error)}): set the environment variable TMPDIR "
            "to a folder that can be written to"
        ) from error


def map_file(path: Path) -> memoryview:
    """The file's bytes as memory, which reads them when they are used; they stay when the file is deleted.

    Writing there changes neither the file nor what others see; it only costs memory.

    Raises:
        RunError: it cannot be read.
    """
    with saying_what_to_do("read", path), path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process had begun to write. Only for the one process that writes there."""
    for path in folder.glob(f".*{LEFTOVER}"):
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def saying_what_to_do(action: str, path: Path) -> Iterator[None]:
    """Turn the system's errors into a RunError that says what could not be done, where, why, and what to do."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "Check that disk, or choose another folder.")
        raise RunError(f"cannot {action} '{path}': {error.strerror or error}. {advice}") from error


def _stage(path: Path, data: Data, *, durable: bool) -> Path:
    """Write `data` beside `path` under a temporary name of its own."""
    temporary = path.with_name(f".{path.name[:150]}.{secrets.token_hex(4)}{LEFTOVER}")
    chunks: Iterable[bytes | memoryview]
    chunks = [data.encode()] if isinstance(data, str) else [data] if isinstance(data, bytes) else data
    try:
        with temporary.open("xb", buffering=0) as file:
            for chunk in chunks:
                _write_all(file.fileno(), chunk)
            if durable:
                os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _write_all(descriptor: int, chunk: bytes | memoryview) -> None:
    rest = memoryview(chunk).cast("B")
    while rest:  # one call writes at most 2 GiB on Linux
        rest = rest[os.write(descriptor, rest) :]


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
