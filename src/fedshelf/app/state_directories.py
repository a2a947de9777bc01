"""Finds the state directories of this machine's clients, by their photo folders. Nothing here imports torch."""

import itertools
import json
import socket
from pathlib import Path

from fedshelf.config import places
from fedshelf.core.errors import UsageError
from fedshelf.core.text import from_filesystem
from fedshelf.privacy.ledger_content import FILE

RECORD = "client.json"  # in a state directory: the client it belongs to
ELSEWHERE = "other-state-directories"  # in the home: one file for each outside of it, with its path
COMMON_FOLDERS = frozenset({"local_data", "data", "photos", "train"})


def other_state_dirs(state_dir: Path, data_dir: Path | None = None) -> list[Path]:
    """Find other state directories that were used with the same photo folders, from the same home.

    Args:
        state_dir: a client's state directory.
        data_dir: its photo folder, resolved; None for those that it was used with before.

    Returns:
        Their state directories, in order of their paths.
    """
    photos = photo_folders(state_dir) | ({str(data_dir)} if data_dir else set())
    return sorted(other for other in state_directories() - {state_dir} if photos & photo_folders(other))


def state_directories() -> set[Path]:
    """The state directories of all clients that were started from this home."""
    clients, elsewhere = places.client_directory("x").parent, places.home_directory() / ELSEWHERE
    found = {path.parent.resolve() for path in clients.glob(f"*/{RECORD}")}
    return found | {Path(path.read_text(encoding="utf-8")) for path in elsewhere.glob("[!.]*")}


def state_dir_of(folder: Path) -> Path:
    """Find a client's state directory.

    Args:
        folder: the state directory itself, or the photo folder of a client that has its state in the default place.

    Returns:
        The state directory.

    Raises:
        UsageError: it is neither.
    """
    resolved = places.absolute(folder).resolve()
    if (resolved / RECORD).is_file() or (resolved / FILE).is_file():
        return resolved
    found = [path.parent for path in _newest_first() if record_of(path.parent).get("data_dir") == str(resolved)]
    if not found:
        raise UsageError(
            f"'{folder}' is neither a store's state directory nor a photo folder that a client on this machine has used"
            ": give the client's --data-dir, or its --state-dir if it has one"
        )
    return found[0]


def default_name(folder: Path) -> str:
    """Choose a client's name.

    It is the name that this folder's client had at its last start. Otherwise it is the folder's name, combined with the
    machine's name if the folder has a common name, and with a number if another folder on this machine uses the name.

    Args:
        folder: the photo folder, resolved.

    Returns:
        The name.
    """
    records = [record for path in _newest_first() if (record := record_of(path.parent))]
    own = [record["name"] for record in records if record["data_dir"] == str(folder)]
    if own:
        return own[0]
    host = socket.gethostname().partition(".")[0]
    name = from_filesystem(folder.name)
    base = f"{name}-{host}" if name.lower() in COMMON_FOLDERS else name or host
    others = {record["name"] for record in records if _is_folder(Path(record["data_dir"]))}
    numbered = (f"{base}-{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain([base], numbered) if name not in others)


def photo_folders(state_dir: Path) -> set[str]:
    """The photo folders that a state directory was used with."""
    try:
        record = json.loads((state_dir / RECORD).read_text(encoding="utf-8"))
        return {str(record["data_dir"]), *map(str, record.get("data_dirs", ()))}
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def record_of(state_dir: Path) -> dict[str, str]:
    """Return the `name` and `data_dir` recorded in a state directory; empty if unknown."""
    try:
        record = json.loads((state_dir / RECORD).read_text(encoding="utf-8"))
        return {"name": str(record["name"]), "data_dir": str(record["data_dir"])}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _newest_first() -> list[Path]:
    states = places.client_directory("x").parent
    return sorted(states.glob(f"*/{RECORD}"), key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # no permission
        return False
