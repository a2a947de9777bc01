"""Where FedShelf keeps what belongs to this machine's user rather than to a run."""

import os
from pathlib import Path

import platformdirs

HOME_VARIABLE = "FEDSHELF_HOME"
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


def client_model(state_dir: Path) -> Path:
    """Where a client with that state directory keeps the model that is its own."""
    return state_dir / "model"


def folder_name(client: str) -> str:
    """A name for a folder of the client's own, which leads nowhere else."""
    safe = (c if c.isalnum() or c in "-_" or (c == "." and i) else f"%{ord(c):x}" for i, c in enumerate(client))
    return "".join(safe) or "%"
