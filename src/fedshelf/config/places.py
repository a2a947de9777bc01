"""Default locations of user-specific data, as opposed to a run's data."""

import errno
import hashlib
import os
from pathlib import Path

import platformdirs

from fedshelf.core.errors import RunError, UsageError
from fedshelf.core.system_errors import current_user, reason
from fedshelf.storage.atomic_files import disk_advice, make_private_folder

HOME_VARIABLE = "FEDSHELF_HOME"
MAX_NAME_BYTES = 240
RUNS = Path("runs")  # below the working directory, because users inspect their runs


def absolute(path: Path) -> Path:
    """Return the absolute path, with `~` expanded.

    Args:
        path: the user's input.

    Raises:
        UsageError: the path is invalid: `~` of an unknown user, a deleted working directory, a null character.
    """
    if "\0" in str(path):
        raise UsageError(f"{str(path)!r} is not a path: it holds a null character")
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        raise UsageError(
            f"'{path}': the system knows no home directory for {path.parts[0]}; write the whole path"
        ) from None
    except OSError as error:
        raise UsageError(
            f"'{path}' is relative to the working folder, which is gone ({reason(error)}): change to another folder, "
            "or write the whole path"
        ) from None


def home_directory() -> Path:
    """Return the user's FedShelf directory: ``$FEDSHELF_HOME``, or else below the system's application data.

    Raises:
        UsageError: the user has no home directory, and the variable is not set.
    """
    override = os.environ.get(HOME_VARIABLE)
    if override:
        return absolute(Path(override))
    try:
        folder = Path(platformdirs.user_data_dir("fedshelf", appauthor=False))
    except RuntimeError:
        folder = Path("~")
    if folder.parts[0] == "~":
        raise UsageError(
            f"{current_user()} has no home directory, so there is no place for certificates, decoded photos and client "
            f"states: set {HOME_VARIABLE} to a folder that this user can write to"
        )
    return absolute(folder)


def use_home(folder: Path) -> None:
    """Make `folder` the FedShelf directory of this process and the processes that it starts."""
    os.environ[HOME_VARIABLE] = str(absolute(folder))


def make_home_folder(path: Path) -> Path:
    """Create a folder below the home directory that only its owner can read, or check that it is writable.

    Args:
        path: the folder.

    Returns:
        The folder.

    Raises:
        RunError: this user cannot create it or write to it.
    """
    try:
        make_private_folder(path)
        if not os.access(path, os.W_OK | os.X_OK):
            number = errno.EROFS if os.statvfs(path).f_flag & os.ST_RDONLY else errno.EACCES
            raise OSError(number, os.strerror(number))
    except OSError as error:
        advice = disk_advice(error) or f"set {HOME_VARIABLE} to a folder that this user can write to"
        raise RunError(f"{current_user()} cannot write to '{path}' ({reason(error)}): {advice}") from error
    return path


def tls_directory() -> Path:
    """Return the directory of a server's certificate authority, which a client on the same machine also checks."""
    return home_directory() / "tls"


def identity_directory() -> Path:
    """Return the directory of the chain's identity: keys, roster, tokens and audit log of the server."""
    return home_directory() / "identity"


def photo_cache() -> Path:
    """Return the writable directory of decoded photos, which can be deleted at any time.

    Raises:
        RunError: see `make_home_folder`.
    """
    return make_home_folder(home_directory() / "cache")


def client_directory(name: str) -> Path:
    """Return the state directory of the client `name`; never inside its data."""
    return home_directory() / "clients" / folder_name(name)


def client_model(state_dir: Path) -> Path:
    """Return the directory of a client's own model."""
    return state_dir / "model"


def folder_name(client: str) -> str:
    """Return a unique folder name for a client, safe and short enough for any file system."""
    escaped = (c if c.isalnum() or c in "-_" or (c == "." and i) else f"%{ord(c):x}" for i, c in enumerate(client))
    safe = "".join(escaped) or "%"
    if len(safe.encode()) <= MAX_NAME_BYTES:
        return safe
    return f"{safe[:50]}%{hashlib.sha256(client.encode()).hexdigest()[:32]}"
