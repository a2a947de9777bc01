"""A store's client, built from its photo folder and its state directory."""

import itertools
import json
import logging
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from torch import Tensor

from fedshelf import __version__
from fedshelf.app.model_card import save_chosen, save_received
from fedshelf.app.photos import FEATURES, NO_PHOTOS, StorePhotos, store_photos, test_photos
from fedshelf.app.setup import OpenedSetup, open_setup
from fedshelf.app.work import work_for
from fedshelf.config import files, places
from fedshelf.config.schema import RunConfig
from fedshelf.core.choices import DeviceName
from fedshelf.core.class_folder import problem_with
from fedshelf.core.errors import DataError, UsageError
from fedshelf.core.messages import (
    PROTOCOL_VERSION,
    Broadcast,
    ClientMessage,
    Comparison,
    Evaluation,
    Join,
    Purpose,
    Ready,
    ServerMessage,
    Setup,
    TaskKey,
)
from fedshelf.core.text import from_filesystem
from fedshelf.data.cache import PhotoCache
from fedshelf.data.filesystem import folder_problem
from fedshelf.data.folder import scan
from fedshelf.data.health import usable_classes
from fedshelf.models.build import at_most
from fedshelf.models.own_model import use_model_path
from fedshelf.privacy import policy as policies
from fedshelf.privacy.policy import STANDARD, Policy
from fedshelf.privacy.task_limits import TaskLimits
from fedshelf.rounds.client import Client, Work
from fedshelf.serialization import messages as payload
from fedshelf.serialization.blob import MAX_HEADER_BYTES
from fedshelf.storage.atomic_files import make_folder, write_atomically
from fedshelf.storage.blob_cache import BlobCache
from fedshelf.storage.client_states import FileClientStates
from fedshelf.storage.held_model import FileHeldModel
from fedshelf.storage.lock import RunLock
from fedshelf.storage.model_files import CARD
from fedshelf.storage.task_log import TaskLog
from fedshelf.training.batch_size import bytes_needed, candidates
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.loop import Run, alone
from fedshelf.training.malloc import keep_freed_memory
from fedshelf.training.trainer import Trainer

logger = logging.getLogger(__name__)
RECORD = "client.json"  # in a state directory: the client it belongs to
MODELS_PER_DOWNLOAD = 6  # a comparison has two; a client that missed rounds gets differences of up to four
MODELS_PER_CHOICE = 16  # with output layers to choose among, which may be most of a model
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
        self.make_state_dir()
        return RunLock(
            self.state_dir / "lock", what=f"the client '{self.name}' (its state is in '{self.state_dir}')",
            instead="give this one another --name",
        )  # fmt: skip

    def make_state_dir(self) -> None:
        """Create the state directory and record the client's name in it.

        Raises:
            RunError: it cannot be written to.
        """
        if self.state_dir.is_relative_to(places.home_directory().resolve()):
            places.make_home_folder(self.state_dir)
        make_folder(self.state_dir)
        record = {"name": self.name, "data_dir": str(self.data_dir.resolve())}
        write_atomically(self.state_dir / RECORD, json.dumps(record))  # at each start: the newest is the last name


def default_name(folder: Path) -> str:
    """Choose a client's name.

    It is the name that this folder's client had at its last start. Otherwise it is the folder's name, combined with the
    machine's name if the folder has a common name, and with a number if another folder on this machine uses the name.

    Args:
        folder: the photo folder, resolved.

    Returns:
        The name.
    """
    states = places.client_directory("x").parent
    newest_first = sorted(states.glob(f"*/{RECORD}"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    records = [record for path in newest_first if (record := _record(path.parent))]
    own = [record["name"] for record in records if record["data_dir"] == str(folder)]
    if own:
        return own[0]
    host = socket.gethostname().partition(".")[0]
    name = from_filesystem(folder.name)
    base = f"{name}-{host}" if name.lower() in COMMON_FOLDERS else name or host
    others = {record["name"] for record in records if _is_folder(Path(record["data_dir"]))}
    numbered = (f"{base}-{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain([base], numbered) if name not in others)


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


def join_of(place: ClientPlace) -> Join:
    """Create the client's `Join`.

    Args:
        place: the client's settings.

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
    return Join(
        protocol=PROTOCOL_VERSION, version=__version__, client=place.name, classes=usable_classes(found)
    )  # fmt: skip


class StoreClient:
    """A store's client.

    A setup is saved, so that another process can answer the next broadcast (stock Flower starts one per message).

    Args:
        place: the client's settings.
        policy: what this store does for a server.
        training: trains the model.
        on_choice: called at the end with the comparison and the folder of the store's chosen model.

    Attributes:
        took_part: whether this process has received a model to train or evaluate.
    """

    def __init__(
        self, place: ClientPlace, *, policy: Policy = STANDARD, training: Run = alone,
        on_choice: Callable[[Comparison, Path], None] = lambda comparison, folder: None,
    ) -> None:  # fmt: skip
        self.took_part = False
        self._place = place
        self._policy = policy
        self._training = training
        self._task_limits = TaskLimits(policy, TaskLog(place.state_dir / "accepted-tasks.jsonl"))
        self._on_choice = on_choice
        self._opened: OpenedSetup | None = None
        self._newest: tuple[TaskKey, int, Tensor] | None = None  # task, number of rounds trained, and the model [S]
        self._evaluation: Evaluation | None = None  # of that model
        self._has_chosen = False
        self._setup_file = place.state_dir / "setup.json"
        self._blobs = BlobCache(places.photo_cache() / "models")
        self._client = Client(
            prepare=self._prepare, states=FileClientStates(place.state_dir / "rounds"),
            held=FileHeldModel(place.state_dir / "model.safetensors"), on_model=self._note, accept=self._accept,
        )  # fmt: skip

    def handle(self, message: ServerMessage) -> ClientMessage:
        """See `rounds.client.Client.handle`."""
        if not isinstance(message, Setup) and self._opened is None and self._setup_file.exists():
            text = self._setup_file.read_text(encoding="utf-8")
            known = payload.decode(text, self.find_blob(payload.Header.parse(text).blob) or b"")
            if isinstance(known, Setup):
                self._client.handle(known)
        answer = self._client.handle(message)
        if isinstance(message, Setup) and isinstance(answer, Ready):
            blob = payload.blob_of(message)
            if blob.pieces:
                self._blobs.save(blob)
            write_atomically(self._setup_file, payload.encode_header(message, blob.digest if blob.pieces else ""))
        self._evaluation = answer if isinstance(answer, Evaluation) else self._evaluation
        return answer

    def find_blob(self, digest: str) -> memoryview | None:
        """The blob of a setup, if this machine has received it before."""
        return self._blobs.find(digest) if digest else None

    def keep_model(self) -> Path | None:
        """Save this store's model at the end of a run.

        This is the chosen model if models were compared, or else the newest one from the server. A process that did not
        take part keeps the model of earlier ones.

        Returns:
            The model's folder, or None if there is no model.

        Raises:
            RunError: the model cannot be written.
        """
        folder = places.client_model(self._place.state_dir)
        if self._has_chosen or self._newest is None or self._opened is None:
            return folder if (folder / CARD).is_file() else None
        key, num_rounds, shared = self._newest
        self._client.load_own(key, shared)
        save_received(
            folder, self._opened.bound_model, self._opened.config, self._opened.catalogue, client=self._place.name,
            run_id=key.run_id, num_rounds=num_rounds, evaluation=self._evaluation,
        )  # fmt: skip
        return folder

    @property
    def max_download(self) -> int:
        """Maximum bytes of a model that a server may send: with what algorithms add to it, and encoded or not."""
        layout = None if self._opened is None else self._opened.bound_model.params.layout
        num_values = self._policy.limits.max_parameters if layout is None else layout.size
        models = MODELS_PER_CHOICE if self._opened and self._opened.algorithm.sums else MODELS_PER_DOWNLOAD
        return 4 * num_values * models + MAX_HEADER_BYTES

    def _accept(self, broadcast: Broadcast, trainer: Trainer) -> None:
        configured = trainer.bound_model.settings.batch_size // trainer.growth
        frozen = self._opened.setup.frozen if self._opened else ""
        self._task_limits.accept(broadcast, num_photos=len(trainer.train), batch_size=configured, frozen=frozen)

    def _check(self, config: RunConfig) -> None:
        epochs = max(value for name, value in config if name.endswith("epochs") and isinstance(value, int))
        self._policy.check_setup(
            model=config.model, image_size=config.image_size, threads=config.threads, epochs=epochs
        )  # fmt: skip

    def _note(self, broadcast: Broadcast) -> None:
        self.took_part = True
        num_rounds = max(0, broadcast.key.round - (broadcast.purpose is Purpose.TRAIN))
        key = broadcast.counted or broadcast.key if broadcast.purpose is Purpose.EVALUATE else broadcast.key
        # A copy, because the next model is received into the same memory.
        self._newest, self._evaluation = (key, num_rounds, broadcast.params.clone()), None

    def _prepare(self, setup: Setup) -> Work:
        keep_freed_memory()
        limits = self._policy.limits
        self._newest, self._has_chosen, self._opened = None, False, None
        with at_most(limits.max_parameters):
            self._opened = open_setup(setup, device=self._place.device, accept=self._check)
        if self._place.withdraw:
            return work_for(self._place.name, self._opened, NO_PHOTOS, batch_size=self._opened.config.batch_size)
        cache = PhotoCache(root=places.photo_cache(), max_bytes=limits.max_cache_mb * 1_000_000)
        photos = store_photos(self._place.data_dir, self._opened, cache, store=self._place.name)
        test = None
        if self._place.test_dir is not None:  # checked now, because at the end of the run it would be too late
            opened = self._opened
            test = test_photos(self._place.test_dir, opened.config, opened.catalogue, cache, opened.bound_model)
        self._policy.check_memory(bytes_needed(self._opened.bound_model, photos.train))
        batch_size = self._batch_size(setup, self._opened, photos)
        self._policy.check_photos(
            num_train=len(photos.train),
            num_photos=len(photos.train) + len(photos.validation) + photos.num_left_out,
            batch_size=batch_size or self._opened.config.batch_size,
        )
        return work_for(
            self._place.name, self._opened, photos, batch_size=batch_size, test=lambda: test, save=self._save,
            training=self._training,
            per_product=self._policy.metrics.per_product, features_folder=cache.root / FEATURES,
        )  # fmt: skip

    def _save(self, opened: OpenedSetup, bound: BoundModel, comparison: Comparison) -> None:
        folder = places.client_model(self._place.state_dir)
        save_chosen(
            folder, bound, opened.config, opened.catalogue, client=self._place.name, comparison=comparison
        )  # fmt: skip
        self._has_chosen = True
        self._on_choice(comparison, folder)

    def _batch_size(self, setup: Setup, opened: OpenedSetup, photos: StorePhotos) -> int | None:
        """Return the client's own batch size, if it has one: measured once per setup and kept across restarts."""
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
    """Create the client described by a stock SuperNode's `--node-config`.

    Args:
        node_config: `data-dir` and, optionally, `name`, `state-dir`, `test-dir`, `device`, `policy` and `model-path`.

    Returns:
        The client's `Join` and the client.

    Raises:
        UsageError: `data-dir` is missing, or a value is invalid.
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
    place.make_state_dir()
    if "model-path" in node_config:
        use_model_path(places.absolute(Path(str(node_config["model-path"]))))
    return join_of(place), StoreClient(place, policy=policies.load(str(node_config.get("policy", "standard"))))
