"""Where FedShelf keeps what belongs to this machine's user rather than to a run."""

import os
from pathlib import Path

import platformdirs

HOME_VARIABLE = "FEDSHELF_HOME"


def home_directory() -> Path:
    """The user's FedShelf directory: ``$FEDSHELF_HOME``, else where the system keeps application data."""
    override = os.environ.get(HOME_VARIABLE)
    return Path(override).expanduser() if override else Path(platformdirs.user_data_dir("fedshelf", appauthor=False))


def default_tls_directory() -> Path:
    """Where a server keeps its certificate authority, and where a client on the same machine looks for it."""
    return home_directory() / "tls"
