"""Output folders that appear complete or not at all."""

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from fedshelf.core.errors import DataError


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
        work = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
        work.mkdir()
    except OSError as error:
        raise DataError(f"'{out}' cannot be made ({error.strerror or error}): name another place") from error
    try:
        yield work
        work.replace(out)
    except OSError as error:
        raise DataError(f"'{out}' could not be written ({error}): nothing of it is kept") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
