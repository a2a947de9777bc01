"""A store's client, put together from its folder of photos and its state directory."""

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from fedshelf import __version__
from fedshelf.app.components import OpenedSetup, StorePhotos, open_setup, store_photos, test_photos, work_for
from fedshelf.app.model_card import save_chosen
from fedshelf.config import files, places
from fedshelf.core.choices import DeviceName
from fedshelf.core.errors import UsageError
from fedshelf.core.messages import PROTOCOL_VERSION, ClientMessage, Comparison, Join, ServerMessage, Setup
from fedshelf.data.cache import PhotoCache
from fedshelf.data.folder import scan
from fedshelf.rounds.client import Client, Work
from fedshelf.serialization import messages as payload
from fedshelf.storage.atomic_files import make_folder, write_atomically
from fedshelf.storage.client_states import FileClientStates
from fedshelf.storage.held_model import FileHeldModel
from fedshelf.storage.lock import RunLock
from fedshelf.training.batch_size import candidates
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.malloc import keep_freed_memory


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientPlace:
    """What is this machine's own: the photos, those to test on if there are any, the state between rounds, the
    processor."""

    data_dir: Path
    state_dir: Path
    name: str
    device: DeviceName
    test_dir: Path | None = None

    @classmethod
    def of(
        cls, data_dir: Path, *, name: str | None, state_dir: Path | None, device: str, test_dir: Path | None = None
    ) -> "ClientPlace":  # fmt: skip
        """Fill in what was not said: the name is the data folder's, the state lies in the user's own directory.

        Raises:
            UsageError: there is no such folder, or the state would lie among the photos.
        """
        folder = data_dir.expanduser().absolute()
        if not folder.is_dir():
            raise UsageError(f"--data-dir {data_dir}: no such folder")
        test = test_dir.expanduser().absolute() if test_dir else None
        if test is not None and not test.is_dir():
            raise UsageError(f"--test-dir {test_dir}: no such folder")
        if device not in get_args(DeviceName):
            raise UsageError(f"device {device!r}: choose among {', '.join(get_args(DeviceName))}")
        chosen = name or folder.resolve().name
        state = (state_dir.expanduser().absolute() if state_dir else places.client_directory(chosen)).resolve()
        if state.is_relative_to(folder.resolve()):
            raise UsageError(f"--state-dir {state} lies inside the photos of {folder}; choose another place")
        return cls(
            data_dir=folder, state_dir=state, name=chosen, device=cast(DeviceName, device), test_dir=test
        )  # fmt: skip

    def lock(self) -> RunLock:
        """Become the one process of this client.

        Raises:
            RunError: another one runs; the message has its id.
        """
        make_folder(self.state_dir)
        return RunLock(
            self.state_dir / "lock", what=f"the client '{self.name}' (its state is in '{self.state_dir}')",
            instead="give this one another --name",
        )  # fmt: skip


def join_of(place: ClientPlace) -> Join:
    """How the client introduces itself.

    Raises:
        DataError: its folder holds no photos.
    """
    found = scan(place.data_dir, val_fraction=0.0, seed=0)
    return Join(
        protocol=PROTOCOL_VERSION, version=__version__, client=place.name, identity=_identity(place.state_dir),
        classes=found.classes,
    )  # fmt: skip


class StoreClient:
    """The client of one place. A setup survives the process, so that a broadcast can be answered by the next one
    (stock Flower starts a process per message).

    Args:
        place: where it is.
        on_choice: told in the end which model the store keeps, and where it lies.
    """

    def __init__(
        self, place: ClientPlace, *, on_choice: Callable[[Comparison, Path], None] = lambda comparison, folder: None
    ) -> None:  # fmt: skip
        self._place = place
        self._on_choice = on_choice
        self._opened: OpenedSetup | None = None
        self._setup_file = place.state_dir / "setup.json"
        self._client = Client(
            prepare=self._prepare, states=FileClientStates(place.state_dir / "rounds"),
            held=FileHeldModel(place.state_dir / "model.safetensors"),
        )  # fmt: skip

    def handle(self, message: ServerMessage) -> ClientMessage:
        """See `rounds.client.Client.handle`."""
        if isinstance(message, Setup):
            write_atomically(self._setup_file, payload.encode_header(message, ""))
        elif self._opened is None and self._setup_file.exists():
            known = payload.decode(self._setup_file.read_text(encoding="utf-8"), b"")
            if isinstance(known, Setup):
                self._client.handle(known)
        return self._client.handle(message)

    def _prepare(self, setup: Setup) -> Work:
        keep_freed_memory()
        self._opened = open_setup(setup, device=self._place.device)
        cache = PhotoCache(root=places.photo_cache())
        photos = store_photos(self._place.data_dir, self._opened, cache)
        test = None
        if (
            self._place.test_dir is not None
        ):  # now: at the end of the run it would be late to learn that it is of no use
            test = test_photos(self._place.test_dir, self._opened.config, self._opened.catalogue, cache)
        return work_for(
            self._place.name, self._opened, photos, batch_size=self._batch_size(setup, self._opened, photos),
            test=lambda: test, save=self._save,
        )  # fmt: skip

    def _save(self, opened: OpenedSetup, bound: BoundModel, comparison: Comparison) -> None:
        folder = self._place.state_dir / "model"
        save_chosen(
            folder, bound, opened.config, opened.catalogue, client=self._place.name, comparison=comparison
        )  # fmt: skip
        self._on_choice(comparison, folder)

    def _batch_size(self, setup: Setup, opened: OpenedSetup, photos: StorePhotos) -> int | None:
        """The client's own batch size where it has one: measured once for a setup, and the same after a restart."""
        if opened.batch_sizes is None:
            return None
        measured_for = [setup.run_id, files.digest(setup.config), self._place.device, len(photos.train)]
        kept = self._place.state_dir / "batch-size.json"
        try:
            known = json.loads(kept.read_text(encoding="utf-8"))
            allowed = candidates(opened.config.batch_size, len(photos.train))
            if known["measured_for"] == measured_for and known["batch_size"] in allowed:
                return int(known["batch_size"])
        except (OSError, ValueError, TypeError, KeyError):
            pass  # nothing was measured, or the file is damaged
        size = opened.batch_sizes.best_for(photos.train)
        write_atomically(kept, json.dumps({"measured_for": measured_for, "batch_size": size}))
        return size


def from_node_config(node_config: Mapping[str, object]) -> tuple[Join, StoreClient]:
    """The client that a stock SuperNode's `--node-config` describes: `data-dir`, and `name`, `state-dir`,
    `test-dir`, `device` where they are not the defaults.

    Raises:
        UsageError: `data-dir` is missing, or a value cannot be used.
    """
    if "data-dir" not in node_config:
        raise UsageError('--node-config must say where the photos are: data-dir="/path/to/photos"')
    state_dir, test_dir = node_config.get("state-dir"), node_config.get("test-dir")
    name = node_config.get("name")
    place = ClientPlace.of(
        Path(str(node_config["data-dir"])), name=str(name) if name else None,
        state_dir=Path(str(state_dir)) if state_dir else None, device=str(node_config.get("device", "auto")),
        test_dir=Path(str(test_dir)) if test_dir else None,
    )  # fmt: skip
    make_folder(place.state_dir)
    return join_of(place), StoreClient(place)


def _identity(state_dir: Path) -> str:
    """This client's random token, made on first start. Not a secret that opens anything: it tells a restarted
    client from another one of the same name."""
    path = make_folder(state_dir) / "identity"
    if not path.exists():
        write_atomically(path, secrets.token_hex(16))
    return path.read_text(encoding="utf-8").strip()
