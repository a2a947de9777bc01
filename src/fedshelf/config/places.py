"""Where FedShelf keeps what belongs to this machine's user rather than to a run."""

import hashlib
import os
from pathlib import Path

import platformdirs

HOME_VARIABLE = "FEDSHELF_HOME"
MAX_NAME_BYTES = 240
RUNS = Path("runs")  # below the working folder: a run is the user's own, to be looked into


def home_directory() -> Path:
    """The user's FedShelf directory: ``$FEDSHELF_HOME``, else where the system keeps application data."""
    override = os.environ.get(HOME_VARIABLE)
    return Path(override).expanduser() if override else Path(platformdirs.user_data_dir("fedshelf", appauthor=False))


def tls_directory() -> Path:
    """Where a server keeps its certificate authority, and where a client on the same machine looks for it."""
    return home_directory() / "tls"


def photo_cache() -> Path:
    """Where decoded photos are kept; deleting it costs nothing but time."""
    return home_directory() / "cache"


def client_directory(name: str) -> Path:
    """Where the client of that name keeps its state; never inside its data."""
    return home_directory() / "clients" / folder_name(name)


def folder_name(client: str) -> str:
    """A name for a folder of the client's own, which leads nowhere else and is short enough for any file system."""
    escaped = (c if c.isalnum() or c in "-_" or (c == "." and i) else f"%{ord(c):x}" for i, c in enumerate(client))
    safe = "".join(escaped) or "%"
    if len(safe.encode()) <= MAX_NAME_BYTES:
        return safe
    return f"{safe[:50]}%{hashlib.sha256(client.encode()).hexdigest()[:32]}"
