"""One process that plays any client: one module, one workbench, as many clients as asked for."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedshelf import __version__
from fedshelf.config.build import (
    ModuleFactory,
    OpenedSetup,
    StorePhotos,
    open_setup,
    store_photos,
    test_photos,
    work_for,
)
from fedshelf.core.choices import DeviceName
from fedshelf.core.errors import DataError
from fedshelf.core.messages import (
    PROTOCOL_VERSION,
    Broadcast,
    ClassFolder,
    ClientMessage,
    Join,
    ServerMessage,
    Setup,
    TaskKey,
)
from fedshelf.core.state import ClientState
from fedshelf.data.cache import PhotoCache
from fedshelf.data.dataset import PhotoSet
from fedshelf.data.folder import scan
from fedshelf.rounds.client import Client, Work
from fedshelf.training.trainer import BatchScore, evaluate_batches


class Stores(Protocol):
    """Where simulated clients have their photos from. Picklable: worker processes get a copy."""

    def names(self) -> tuple[str, ...]:
        """All stores, sorted."""
        ...

    def classes(self, name: str) -> tuple[ClassFolder, ...]: ...

    def photos(self, name: str, opened: OpenedSetup) -> StorePhotos: ...

    def test(self, opened: OpenedSetup) -> PhotoSet: ...


@dataclass(frozen=True, kw_only=True)
class FolderStores:
    """One folder per store below `root`, decoded through the cache."""

    root: Path
    cache: Path
    test_dir: Path | None

    def names(self) -> tuple[str, ...]:
        try:
            found = sorted(p.name for p in self.root.iterdir() if p.is_dir() and not p.name.startswith("."))
        except OSError as error:
            raise DataError(f"--data-dir {self.root}: {error.strerror}") from None
        if not found:
            raise DataError(
                f"--data-dir {self.root} holds no folder: simulate wants one folder of photos per store "
                "('fedshelf data partition PHOTOS --out STORES' makes them)"
            )
        return tuple(found)

    def classes(self, name: str) -> tuple[ClassFolder, ...]:
        return scan(self.root / name, val_fraction=0.0, seed=0).classes

    def photos(self, name: str, opened: OpenedSetup) -> StorePhotos:
        return store_photos(self.root / name, opened, PhotoCache(root=self.cache))

    def test(self, opened: OpenedSetup) -> PhotoSet:
        if self.test_dir is None:
            raise DataError("there is no --test-dir to evaluate on")
        return test_photos(self.test_dir, opened.config, opened.catalogue, PhotoCache(root=self.cache))


class MemoryStores:
    """Photo sets that the caller has in memory; their bytes are shared with worker processes, not copied.

    Args:
        stores: each store's training photos, labels indexing `class_names`.
        test: photos for central evaluation.
        class_names: names by label.
    """

    def __init__(self, stores: Mapping[str, PhotoSet], test: PhotoSet | None, class_names: Iterable[str]) -> None:
        self._class_names = tuple(class_names)
        sets = {name: stores[name] for name in sorted(stores)}
        ends = np.cumsum([len(photos) for photos in sets.values()]).tolist()
        self._rows = {name: slice(end - len(sets[name]), end) for name, end in zip(sets, ends, strict=True)}
        self._has_test = test is not None
        # One pair of tensors, however many stores: a shared tensor takes a file descriptor in every process.
        parts = [*sets.values(), *([test] if test is not None else [])]
        self._images = torch.from_numpy(np.concatenate([photos.images for photos in parts])).share_memory_()
        self._labels = torch.from_numpy(np.concatenate([photos.labels for photos in parts])).share_memory_()

    def names(self) -> tuple[str, ...]:
        return tuple(self._rows)

    def classes(self, name: str) -> tuple[ClassFolder, ...]:
        return tuple(ClassFolder(leaf=label, path=label) for label in self._class_names)

    def photos(self, name: str, opened: OpenedSetup) -> StorePhotos:
        train = self._photo_set(self._rows[name], opened)
        return StorePhotos(train=train, validation=PhotoSet(train.images[:0], train.labels[:0]))

    def test(self, opened: OpenedSetup) -> PhotoSet:
        if not self._has_test:
            raise DataError("there are no test photos to evaluate on")
        num_train = sum(rows.stop - rows.start for rows in self._rows.values())
        return self._photo_set(slice(num_train, len(self._labels)), opened)

    def _photo_set(self, rows: slice, opened: OpenedSetup) -> PhotoSet:
        """Photos with the catalogue's labels: it sorts the names that the caller's labels index."""
        images, labels = self._images[rows].numpy(), self._labels[rows].numpy()
        if self._class_names == opened.catalogue.names:
            return PhotoSet(images, labels)
        index = {name: i for i, name in enumerate(opened.catalogue.names)}
        return PhotoSet(images, np.array([index[name] for name in self._class_names])[labels])


class SimulatedStates:
    """`ClientStates` in memory. A simulated server never asks twice, so uploads are not kept."""

    def __init__(self) -> None:
        self._state = ClientState()
        self._pending: tuple[TaskKey, ClientState] | None = None

    def settle(self, broadcast: Broadcast) -> ClientState:
        if self._pending is not None and self._pending[0] == broadcast.counted:
            self._state = self._pending[1]
        self._pending = None
        return self._state

    def answered(self, key: TaskKey) -> ClientMessage | None:
        return None

    def hold(self, key: TaskKey, upload: ClientMessage, state: ClientState) -> None:
        self._pending = (key, state)


def join_of(stores: Stores, name: str) -> Join:
    """How a simulated client introduces itself."""
    return Join(
        protocol=PROTOCOL_VERSION, version=__version__, client=name, identity=name, classes=stores.classes(name)
    )  # fmt: skip


@dataclass(kw_only=True, eq=False)
class Player:
    """Plays the clients of `stores`, one message at a time."""

    stores: Stores
    device: DeviceName
    make_module: ModuleFactory | None = None
    _clients: dict[str, Client] = field(default_factory=dict)
    _opened: OpenedSetup | None = None
    _test: PhotoSet | None = None

    def play(self, name: str, message: ServerMessage) -> ClientMessage:
        """What client `name` answers to `message`. Who played it before, here or elsewhere, is no matter: a client
        that is new here is set up like all others."""
        if name not in self._clients:
            client = Client(prepare=lambda setup: self._prepare(name, setup), states=SimulatedStates())
            self._clients[name] = client
            if isinstance(message, Broadcast) and self._opened is not None:
                client.handle(self._opened.setup)
        return self._clients[name].handle(message)

    def open(self, setup: Setup) -> OpenedSetup:
        """What `setup` describes, built once for all clients."""
        if self._opened is None or self._opened.setup != setup:
            self._opened = open_setup(setup, device=self.device, make_module=self.make_module)
            self._test = None
        return self._opened

    def evaluate(self, setup: Setup, params: Tensor, batches: Iterable[int]) -> list[BatchScore]:
        """Score `params` [S] on some batches of the test photos."""
        opened = self.open(setup)
        opened.workbench.load(params)
        return evaluate_batches(opened.workbench, self.test_set(opened), batches)

    def test_set(self, opened: OpenedSetup) -> PhotoSet:
        """The test photos, loaded once."""
        if self._test is None:
            self._test = self.stores.test(opened)
        return self._test

    def _prepare(self, name: str, setup: Setup) -> Work:
        opened = self.open(setup)
        return work_for(name, opened, self.stores.photos(name, opened))
