"""The file system: errors converted to a `DataError` that says what to do, and folders written as a whole."""

import contextlib
import errno
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from fedshelf.core.errors import DataError
from fedshelf.core.system_errors import current_user

_NO_ANSWER = "its disk or network drive does not answer: check that it is mounted"
_REMEDIES = {
    errno.EACCES: "allow {user} to read it",
    errno.EPERM: "allow {user} to read it",
    errno.ELOOP: "it is a link that leads back to itself: remove it",
    errno.ENAMETOOLONG: "move it to a place with a shorter path",
    errno.ESTALE: _NO_ANSWER,
    errno.EIO: _NO_ANSWER,
    errno.ENOTCONN: _NO_ANSWER,
    errno.EHOSTDOWN: _NO_ANSWER,
    errno.ETIMEDOUT: _NO_ANSWER,
}


def cause(error: OSError | ValueError) -> str:
    """Why something cannot be read, and what helps: `Permission denied; allow user 'www' to read it`."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text; save it as UTF-8"
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{error.strerror}; {remedy.format(user=current_user())}" if remedy else error.strerror


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Raise a `DataError` that names `what` if the block fails to read it."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise DataError(f"{what} cannot be read: {cause(error)}") from error


def folder_problem(path: Path) -> str:
    """Why there is no folder at `path`; empty if there is one."""
    return _problem(path, stat.S_ISDIR, "folder")


def file_problem(path: Path) -> str:
    """Why there is no file at `path`; empty if there is one."""
    return _problem(path, stat.S_ISREG, "file")


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `out` if the block succeeds, and removed otherwise.

    Raises:
        DataError: `out` exists and is not an empty folder, or cannot be written.
    """
    try:
        if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
            raise DataError(f"'{out}' exists already and is not an empty folder: name another one or remove it first")
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise DataError(f"'{out}' cannot be made ({error.strerror or error}): name another place") from error
    try:
        yield work
        work.chmod(0o755)
        work.replace(out)
    except OSError as error:
        raise DataError(f"'{out}' could not be written ({error}): nothing of it is kept") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _problem(path: Path, is_kind: Callable[[int], bool], kind: str) -> str:
    try:
        return "" if is_kind(path.stat().st_mode) else f"it is not a {kind}"
    except FileNotFoundError:
        return f"no such {kind}"
    except (OSError, ValueError) as error:
        return cause(error)
