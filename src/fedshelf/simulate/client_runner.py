"""Runs any client in one process, with one module and one bound model for all of them."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from torch import Tensor

from fedshelf.app.differential_privacy import tells_of_validation
from fedshelf.app.model import ModuleFactory
from fedshelf.app.model_card import save_chosen
from fedshelf.app.photos import StorePhotos
from fedshelf.app.setup import OpenedSetup, open_setup
from fedshelf.app.teacher import own_teacher
from fedshelf.app.work import work_for
from fedshelf.config import files, places
from fedshelf.core.choices import DeviceName
from fedshelf.core.errors import FedShelfError
from fedshelf.core.messages import ClientMessage, Comparison, Failure, Ready, ServerMessage, Setup
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.photo_set import PhotoSet
from fedshelf.privacy.withholding import only_noised
from fedshelf.rounds.client import Client, Work
from fedshelf.simulate.attacks import NO_ATTACK, Attack
from fedshelf.simulate.states import SimulatedStates
from fedshelf.simulate.stores import Stores
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.distillation import Teacher
from fedshelf.training.loop import Run, alone
from fedshelf.training.trainer import Score, evaluate_batches, num_batches

Adapt = Callable[[Work], Work]


@dataclass(kw_only=True, eq=False)
class ClientRunner:
    """Runs the clients of `stores`, one message at a time. Holds no state of any client.

    Attributes:
        stores: the clients' photos.
        device: the device to compute on.
        make_module: creates the caller's own model, if there is one.
        model_path: folder of modules of users' own models, for processes that are not forked.
        attack: the simulated attack.
        training: trains a client's model.
        states: folder of the clients' states; required before the first round.
        models: folder for the models that stores keep at the end; None saves none.
        teachers: folder of the models that stores have kept in the teacher's run; None: there is no such run.
    """

    stores: Stores
    device: DeviceName
    make_module: ModuleFactory | None = None
    model_path: Path | None = None
    attack: Attack = NO_ATTACK
    training: Run = alone
    states: Path | None = None
    models: Path | None = None
    teachers: Path | None = None
    _setup: Setup | None = None
    _expected: tuple[Catalogue, Ready, bool] | None = None  # and whether stores tell of their validation photos
    _opened: OpenedSetup | None = None
    _own_teachers: tuple[OpenedSetup, dict[str, Teacher | None]] | None = None
    _test: PhotoSet | None = None

    def run(self, name: str, message: ServerMessage, *, adapt: Adapt = lambda work: work) -> ClientMessage:
        """Handle a message as client `name`. The result does not depend on which process ran the client before.

        Args:
            name: the client's name.
            message: the server's message.
            adapt: modifies the client's work, for example to use another bound model.

        Returns:
            The client's answer.
        """
        if isinstance(message, Setup):
            return self.ready(name, message) or self._client(name, adapt).handle(message)
        if self._setup is None:
            raise ValueError(f"client {name!r} is given work before any setup was opened")
        client = self._client(name, adapt)
        prepared = client.handle(self._setup)
        if isinstance(prepared, Failure):
            return replace(prepared, key=message.key)
        return client.handle(message)

    def ready(self, name: str, setup: Setup) -> Ready | None:
        """Answer `setup` without opening the store's photos; return None if that is impossible."""
        self.prepare(setup)
        if self._expected is None:
            catalogue = Catalogue.from_json(setup.catalogue)
            ready = Ready(
                run_id=setup.run_id, layout_digest=setup.layout_digest,  # `open` checks the model built here
                catalogue_digest=catalogue.digest, config_digest=files.digest(setup.config),
                num_train=0, num_validation=0, num_left_out=0,
            )  # fmt: skip
            self._expected = catalogue, ready, tells_of_validation(files.from_a_server(setup.config))
        catalogue, ready, tells = self._expected
        counts = self.stores.num_photos(name, catalogue)
        if counts is None:
            return None
        found = replace(ready, num_train=counts[0], num_validation=counts[1])
        return found if tells else only_noised(found)

    def prepare(self, setup: Setup) -> None:
        """Set the current setup; its objects are built when needed."""
        if setup != self._setup:
            self._setup, self._expected, self._opened, self._test = setup, None, None, None

    def open(self, setup: Setup) -> OpenedSetup:
        """Build the objects of a setup, once for all clients.

        Raises:
            FedShelfError: the model built here differs from the server's.
        """
        self.prepare(setup)
        if self._opened is None:
            opened = open_setup(setup, device=self.device, make_module=self.make_module)
            if opened.bound_model.params.layout.digest != setup.layout_digest:
                raise FedShelfError(
                    "the model that a simulated client built differs from the server's: the function that makes it "
                    "must make the same one every time"
                )
            self._opened = opened
        return self._opened

    def evaluate(self, setup: Setup, params: Tensor, *, share: int = 0, shares: int = 1) -> Sequence[Score]:
        """Evaluate a model on one contiguous share of the test batches.

        Args:
            setup: the run's setup.
            params: the model [S].
            share: index of the share.
            shares: number of shares.

        Returns:
            One score per batch.
        """
        opened = self.open(setup)
        test = self._test_photos(opened)
        count = num_batches(test)
        opened.bound_model.load(params)
        batches = range(count * share // shares, count * (share + 1) // shares)
        return evaluate_batches(opened.bound_model, test, batches)

    def _test_photos(self, opened: OpenedSetup) -> PhotoSet:
        """Return the photos for central evaluation, on which stores also compare their models."""
        if self._test is None:
            self._test = self.stores.test(opened)
        return self._test

    def _test_of(self, name: str, opened: OpenedSetup, photos: StorePhotos) -> PhotoSet | None:
        """Return the photos on which a store compares its models: with its sales, if it uses them."""
        if not self.stores.has_test:
            return None
        return self._test_photos(opened) if photos.sales is None else self.stores.test(opened, name, photos.sales)

    def _teacher_of(self, name: str, opened: OpenedSetup) -> Teacher | None:
        """The model that a store has chosen in the teacher's run, opened once per setup; None if there is none."""
        if opened.sent_teacher is None or self.teachers is None:
            return None
        if self._own_teachers is None or self._own_teachers[0] is not opened:
            self._own_teachers = opened, {}
        known = self._own_teachers[1]
        if name not in known:
            folder, device = self.teachers / places.folder_name(name), opened.bound_model.compute.device
            known[name] = own_teacher(folder, opened.sent_teacher, opened.catalogue.names, device)
        return known[name]

    def _client(self, name: str, adapt: Adapt) -> Client:
        if self.states is None:
            raise ValueError("running clients needs the folder of their states")

        def prepare(setup: Setup) -> Work:
            opened = self.open(setup)
            photos = self.attack.photos(name, self.stores.photos(name, opened), len(opened.catalogue))
            work = work_for(
                name, opened, photos, test=lambda: self._test_of(name, opened, photos),
                save=partial(self._save, name), training=self.training,
                features_folder=self.stores.features_folder, teacher=self._teacher_of(name, opened),
            )  # fmt: skip
            return adapt(self.attack.work(name, work))

        return Client(prepare=prepare, states=SimulatedStates(self.states, name))

    def _save(
        self, name: str, opened: OpenedSetup, photos: StorePhotos, bound: BoundModel, comparison: Comparison
    ) -> None:  # fmt: skip
        if self.models is not None:
            folder = self.models / places.folder_name(name)
            save_chosen(
                folder, bound, opened.config, opened.catalogue, client=name, comparison=comparison, sales=photos.sales
            )  # fmt: skip


class Backend(Protocol):
    """Runs clients, in this process or in others."""

    def submit(self, name: str, message: ServerMessage) -> None:
        """Accept a message for client `name`; may start computing."""

    def next(self) -> tuple[str, ClientMessage] | None:
        """Return the next client and its answer, or None if there is no work."""


class InProcess:
    """A backend that computes each answer when it is requested.

    Args:
        run: handles a message as the named client; a failure of the client is an answer, too.
    """

    def __init__(self, run: Callable[[str, ServerMessage], ClientMessage]) -> None:
        self._run = run
        self._queue: deque[tuple[str, ServerMessage]] = deque()

    def submit(self, name: str, message: ServerMessage) -> None:
        """See `Backend`."""
        self._queue.append((name, message))

    def next(self) -> tuple[str, ClientMessage] | None:
        """See `Backend`."""
        if not self._queue:
            return None
        name, message = self._queue.popleft()
        return name, self._run(name, message)
