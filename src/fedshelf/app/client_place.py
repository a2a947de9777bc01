"""Where a client runs: its photos, its name, its state directory, and the limits that its store sets."""

import itertools
import json
import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from fedshelf import __version__
from fedshelf.config import places
from fedshelf.core.choices import DeviceName
from fedshelf.core.class_folder import problem_with
from fedshelf.core.errors import DataError, UsageError
from fedshelf.core.messages import (
    PROTOCOL_VERSION,
    Join,
)
from fedshelf.core.text import from_filesystem
from fedshelf.data.filesystem import folder_problem
from fedshelf.data.folder import scan
from fedshelf.data.health import usable_classes
from fedshelf.privacy.ledger_content import FILE
from fedshelf.storage.atomic_files import make_folder, write_atomically
from fedshelf.storage.lock import RunLock

logger = logging.getLogger(__name__)

RECORD = "client.json"  # in a state directory: the client it belongs to
_ELSEWHERE = "other-state-directories"  # in the home: one file for each outside of it, with its path
COMMON_FOLDERS = frozenset({"local_data", "data", "photos", "train"})


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientPlace:
    """A client's machine-specific settings.

    Attributes:
        data_dir: folder of the training photos.
        state_dir: folder for data kept between rounds and runs, including the client's name.
        name: the client's name at the server and in other stores.
        device: the device to compute on.
        test_dir: folder of test photos, if there are any.
        withdraw: whether the client takes part to have its photos taken out of the model.
    """

    data_dir: Path
    state_dir: Path
    name: str
    device: DeviceName
    test_dir: Path | None = None
    withdraw: bool = False

    @classmethod
    def of(
        cls, data_dir: Path, *, name: str | None, state_dir: Path | None, device: str, test_dir: Path | None = None,
        withdraw: bool = False,
    ) -> "ClientPlace":  # fmt: skip
        """Create an instance with defaults for what is not given.

        The default state directory is in the user's home directory. The default name is the one in the state directory,
        or else derived from the data folder (see `default_name`).

        Args:
            data_dir: folder of the training photos.
            name: the client's name.
            state_dir: folder for the client's state.
            device: the device to compute on.
            test_dir: folder of test photos.
            withdraw: whether to have its photos taken out of the model; they are not read.

        Returns:
            The settings.

        Raises:
            UsageError: a value is invalid, the state directory is inside the photos, or there is no home
                directory.
            RunError: the home directory cannot be written to.
        """
        folder = _folder("--data-dir", data_dir)
        test = _folder("--test-dir", test_dir) if test_dir else None
        if test == folder:
            raise UsageError(f"--test-dir {test_dir} is the --data-dir: give photos that are not trained on")
        if device not in get_args(DeviceName):
            raise UsageError(f"device {device!r}: choose among {', '.join(get_args(DeviceName))}")
        places.photo_cache()  # the folder for decoded photos: an error here is better than during a run
        given = places.absolute(state_dir) if state_dir else None
        chosen = name or (_record(given).get("name") if given else None) or default_name(folder.resolve())
        try:
            chosen.encode()
        except UnicodeEncodeError:
            raise UsageError(f"--name {chosen} is not UTF-8 text: give another name") from None
        state = Path(os.path.realpath(given or places.client_directory(chosen)))
        if state.is_relative_to(folder.resolve()):
            raise UsageError(f"--state-dir {state} lies inside the photos of {folder}; choose another place")
        return cls(
            data_dir=folder, state_dir=state, name=chosen, device=cast(DeviceName, device), test_dir=test,
            withdraw=withdraw,
        )  # fmt: skip

    def lock(self) -> RunLock:
        """Lock the state directory, so that only one process runs this client.

        Raises:
            RunError: another process has the lock (the message includes its id), or the directory cannot be written to.
        """
        before = _record(self.state_dir).get("data_dir")
        self.make_state_dir()
        return RunLock(
            self.state_dir / "lock", what=f"the client '{self.name}' (its state is in '{self.state_dir}')",
            instead="wait for it: it uses the same photos" if before == str(self.data_dir.resolve())
            else "give this one another --name",
        )  # fmt: skip

    def make_state_dir(self) -> None:
        """Create the state directory, and record in it the client's name and all photo folders that it has used.

        Raises:
            RunError: it cannot be written to.
        """
        home = places.home_directory().resolve()
        if self.state_dir.is_relative_to(home):
            places.make_home_folder(self.state_dir)
        else:  # to be found by other clients of the same photos
            pointers = places.make_home_folder(home / _ELSEWHERE)
            write_atomically(pointers / places.folder_name(str(self.state_dir)), str(self.state_dir))
        make_folder(self.state_dir)
        folder = str(self.data_dir.resolve())
        record = {"name": self.name, "data_dir": folder, "data_dirs": sorted({*_photos(self.state_dir), folder})}
        write_atomically(self.state_dir / RECORD, json.dumps(record))  # at each start: the newest is the last name

    def other_state_dirs(self) -> list[Path]:
        """See `other_state_dirs`."""
        return other_state_dirs(self.state_dir, self.data_dir.resolve())


def other_state_dirs(state_dir: Path, data_dir: Path | None = None) -> list[Path]:
    """Find other state directories that were used with the same photo folders, from the same home.

    Args:
        state_dir: a client's state directory.
        data_dir: its photo folder, resolved; None for those that it was used with before.

    Returns:
        Their state directories, in order of their paths.
    """
    clients, elsewhere = places.client_directory("x").parent, places.home_directory() / _ELSEWHERE
    found = {path.parent.resolve() for path in clients.glob(f"*/{RECORD}")}
    found |= {Path(path.read_text(encoding="utf-8")) for path in elsewhere.glob("[!.]*")}
    photos = _photos(state_dir) | ({str(data_dir)} if data_dir else set())
    return sorted(other for other in found - {state_dir} if photos & _photos(other))


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
    found = [path.parent for path in _newest_first() if _record(path.parent).get("data_dir") == str(resolved)]
    if not found:
        raise UsageError(
            f"'{folder}' is neither a store's state directory nor a photo folder that a client on this machine has used"
            ": give the client's --data-dir, or its --state-dir if it has one"
        )
    return found[0]


def _newest_first() -> list[Path]:
    states = places.client_directory("x").parent
    return sorted(states.glob(f"*/{RECORD}"), key=lambda path: path.stat().st_mtime_ns, reverse=True)


def default_name(folder: Path) -> str:
    """Choose a client's name.

    It is the name that this folder's client had at its last start. Otherwise it is the folder's name, combined with the
    machine's name if the folder has a common name, and with a number if another folder on this machine uses the name.

    Args:
        folder: the photo folder, resolved.

    Returns:
        The name.
    """
    records = [record for path in _newest_first() if (record := _record(path.parent))]
    own = [record["name"] for record in records if record["data_dir"] == str(folder)]
    if own:
        return own[0]
    host = socket.gethostname().partition(".")[0]
    name = from_filesystem(folder.name)
    base = f"{name}-{host}" if name.lower() in COMMON_FOLDERS else name or host
    others = {record["name"] for record in records if _is_folder(Path(record["data_dir"]))}
    numbered = (f"{base}-{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain([base], numbered) if name not in others)


def _photos(state_dir: Path) -> set[str]:
    """The photo folders that a state directory was used with."""
    try:
        record = json.loads((state_dir / RECORD).read_text(encoding="utf-8"))
        return {str(record["data_dir"]), *map(str, record.get("data_dirs", ()))}
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def _record(state_dir: Path) -> dict[str, str]:
    """Return the `name` and `data_dir` recorded in a state directory; empty if unknown."""
    try:
        record = json.loads((state_dir / RECORD).read_text(encoding="utf-8"))
        return {"name": str(record["name"]), "data_dir": str(record["data_dir"])}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _folder(flag: str, path: Path) -> Path:
    folder = places.absolute(path)
    if problem := folder_problem(folder):
        raise UsageError(f"{flag} {path}: {problem}")
    return folder


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # no permission
        return False


def join_of(place: ClientPlace, *, names_classes: bool = True) -> Join:
    """Create the client's `Join`.

    Args:
        place: the client's settings.
        names_classes: whether it may name the class folders.

    Returns:
        The message that introduces the client.

    Raises:
        DataError: the folder contains no usable photos, or is not the folder of one store.
    """
    if place.withdraw:
        return Join(protocol=PROTOCOL_VERSION, version=__version__, client=place.name, classes=(), withdraws=True)
    found = scan(place.data_dir, val_fraction=0.0, seed=0)
    for finding in found.findings:
        logger.warning(finding)
    if problem := problem_with(found.classes):
        raise DataError(f"--data-dir {place.data_dir} cannot be a store's folder: {problem}")
    classes = usable_classes(found) if names_classes else ()
    return Join(protocol=PROTOCOL_VERSION, version=__version__, client=place.name, classes=classes)


def place_of(state_dir: Path) -> ClientPlace:
    """The settings of the client that a state directory belongs to.

    Args:
        state_dir: the state directory.

    Returns:
        The settings; the device is the CPU.

    Raises:
        UsageError: the directory does not say whose it is, or the photos are gone.
    """
    record = _record(state_dir)
    if not record:
        raise UsageError(f"'{state_dir / RECORD}' does not name a client and its photos: start the client once")
    return ClientPlace.of(
        Path(record["data_dir"]), name=record["name"], state_dir=state_dir, device="cpu", test_dir=None
    )  # fmt: skip
