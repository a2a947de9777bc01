"""Where a client runs: its photos, its name, its state directory, and the limits that its store sets."""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from fedshelf import __version__
from fedshelf.app.state_directories import ELSEWHERE, RECORD, default_name, other_state_dirs, photo_folders, record_of
from fedshelf.config import places
from fedshelf.core.choices import DeviceName
from fedshelf.core.class_folder import problem_with
from fedshelf.core.errors import DataError, UsageError
from fedshelf.core.messages import (
    PROTOCOL_VERSION,
    Join,
)
from fedshelf.data.filesystem import folder_problem
from fedshelf.data.folder import scan
from fedshelf.data.health import usable_classes
from fedshelf.storage.atomic_files import make_folder, write_atomically
from fedshelf.storage.lock import RunLock

logger = logging.getLogger(__name__)


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
        chosen = name or (record_of(given).get("name") if given else None) or default_name(folder.resolve())
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
        before = record_of(self.state_dir).get("data_dir")
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
            pointers = places.make_home_folder(home / ELSEWHERE)
            write_atomically(pointers / places.folder_name(str(self.state_dir)), str(self.state_dir))
        make_folder(self.state_dir)
        folder = str(self.data_dir.resolve())
        record = {"name": self.name, "data_dir": folder, "data_dirs": sorted({*photo_folders(self.state_dir), folder})}
        write_atomically(self.state_dir / RECORD, json.dumps(record))  # at each start: the newest is the last name

    def other_state_dirs(self) -> list[Path]:
        """See `other_state_dirs`."""
        return other_state_dirs(self.state_dir, self.data_dir.resolve())


def _folder(flag: str, path: Path) -> Path:
    folder = places.absolute(path)
    if problem := folder_problem(folder):
        raise UsageError(f"{flag} {path}: {problem}")
    return folder


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
    record = record_of(state_dir)
    if not record:
        raise UsageError(f"'{state_dir / RECORD}' does not name a client and its photos: start the client once")
    return ClientPlace.of(
        Path(record["data_dir"]), name=record["name"], state_dir=state_dir, device="cpu", test_dir=None
    )  # fmt: skip
