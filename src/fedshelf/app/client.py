"""A store's client, built from its photo folder and its state directory."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from fedshelf.app.client_place import ClientPlace, join_of
from fedshelf.app.components import check_setup, most_epochs
from fedshelf.app.model_card import save_chosen, save_received
from fedshelf.app.photos import FEATURES, NO_PHOTOS, StorePhotos, test_photos
from fedshelf.app.run_photos import RunPhotos
from fedshelf.app.setup import OpenedSetup, masking_terms, open_setup
from fedshelf.app.teacher import own_teacher
from fedshelf.app.work import work_for
from fedshelf.config import files, places
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import DataError, UsageError
from fedshelf.core.messages import (
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
from fedshelf.data.cache import PhotoCache
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.photo_set import PhotoSet
from fedshelf.identity.keys import KeyPair
from fedshelf.identity.store_keys import StoreKeys
from fedshelf.models.build import at_most
from fedshelf.models.own_model import use_model_path
from fedshelf.privacy import policy as policies
from fedshelf.privacy.budget import Budget
from fedshelf.privacy.homomorphic import seal
from fedshelf.privacy.homomorphic.decryptors import FileDecryptors
from fedshelf.privacy.ledger import Ledger
from fedshelf.privacy.ledger_content import OtherLedgers
from fedshelf.privacy.policy import STANDARD, Policy
from fedshelf.privacy.secure_aggregation.keys import Identities
from fedshelf.privacy.secure_aggregation.opened_sums import FileOpenedSums
from fedshelf.privacy.task_limits import TaskLimits
from fedshelf.privacy.withholding import withhold
from fedshelf.rounds.client import Client, Work
from fedshelf.rounds.sums.encrypting_client import EncryptingClient
from fedshelf.rounds.sums.masking_client import MaskingClient
from fedshelf.serialization import messages as payload
from fedshelf.serialization.blob import MAX_HEADER_BYTES
from fedshelf.storage.atomic_files import write_atomically
from fedshelf.storage.blob_cache import BlobCache
from fedshelf.storage.client_states import FileClientStates
from fedshelf.storage.held_model import FileHeldModel
from fedshelf.storage.model_files import CARD, load_model_files, save_model
from fedshelf.storage.task_log import TaskLog
from fedshelf.storage.trained_photos import FOLDER, TrainedPhotosLog
from fedshelf.training.batch_size import bytes_needed, candidates
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.distillation import Teacher
from fedshelf.training.loop import Run, alone
from fedshelf.training.malloc import keep_freed_memory
from fedshelf.training.trainer import Trainer

logger = logging.getLogger(__name__)
MODELS_PER_DOWNLOAD = 8  # a comparison has two, an encrypted sum up to seven, an update after missed rounds four
MODELS_PER_CHOICE = 16  # with output layers to choose among, which may be most of a model


class StoreClient:
    """A store's client.

    A setup is saved, so that another process can answer the next broadcast (stock Flower starts one per message).

    Args:
        place: the client's settings.
        policy: what this store does for a server.
        training: trains the model.
        on_choice: called at the end with the comparison and the folder of the store's chosen model.
        keys: the store's identity; None: it has none.
        before_look: called with the catalogue before the photo folder is looked at.

    Attributes:
        took_part: whether this process has received a model to train or evaluate.
        ledger: what has left this store.

    Raises:
        RunError: a file in the state directory cannot be read, or the ledger was altered.
    """

    def __init__(
        self, place: ClientPlace, *, policy: Policy = STANDARD, training: Run = alone,
        on_choice: Callable[[Comparison, Path], None] = lambda comparison, folder: None, keys: StoreKeys | None = None,
        before_look: Callable[[Catalogue], None] = lambda catalogue: None,
    ) -> None:  # fmt: skip
        self._before_look = before_look
        self.took_part = False
        self._place = place
        self._policy = policy
        self._training = training
        self._task_limits = TaskLimits(policy, TaskLog(place.state_dir / "accepted-tasks.jsonl"))
        self.ledger = Ledger(place.state_dir)
        self._budget = Budget(
            lambda: self.ledger.releases, others=OtherLedgers(place.other_state_dirs).releases,
            delta=policy.protection.delta,
            epsilon=policy.protection.epsilon if policy.protection.required == "sample-dp" else None,
        )  # fmt: skip
        self._on_choice = on_choice
        self._opened: OpenedSetup | None = None
        self._photos: RunPhotos | None = None
        self._newest: tuple[TaskKey, int, Tensor] | None = None  # task, number of rounds trained, and the model [S]
        self._evaluation: Evaluation | None = None  # of that model
        self._has_chosen = False
        self._has_warned = False  # that no roster key is pinned
        self._setup_file = place.state_dir / "setup.json"
        self._blobs = BlobCache(places.photo_cache() / "models")
        self._client = Client(
            prepare=self._prepare,
            states=FileClientStates(place.state_dir / "rounds", has_left=self.ledger.has_left),
            held=FileHeldModel(place.state_dir / "model.safetensors"), on_model=self._note, accept=self._accept,
            on_reply=partial(self.ledger.declare, delta=policy.protection.delta), charge=self._budget.spent_with,
            withhold=partial(withhold, metrics=policy.metrics), renew=self._renew,
        )  # fmt: skip

        member, identities = partial(self._name_in_roster, keys), partial(self._identities, keys)
        opened_sums = FileOpenedSums(place.state_dir / "opened-sums.jsonl")
        min_cohort = policy.protection.min_cohort

        def identity() -> KeyPair | None:
            return keys.pair() if keys and keys.enrollment() else None

        self._masking = MaskingClient(
            member, terms=lambda: masking_terms(self._opened) if self._opened else None, opened_sums=opened_sums,
            identity=identity, identities=identities, min_cohort=min_cohort,
        )  # fmt: skip
        self._encryption = EncryptingClient(
            member, terms=lambda: self._opened.encryption if self._opened else None, opened_sums=opened_sums,
            decryptors=FileDecryptors(place.state_dir / "decryptors.json"), identity=identity, identities=identities,
            min_cohort=min_cohort,
        )  # fmt: skip

    def _name_in_roster(self, keys: StoreKeys | None) -> str:
        enrollment = keys.enrollment() if keys else None
        return self._place.name if enrollment is None else enrollment.name

    def _identities(self, keys: StoreKeys | None) -> Identities | None:
        """All stores' keys, if the store pins the key that has signed them."""
        if keys is None or not self._policy.server.roster_key:
            if not self._has_warned:
                logger.warning(
                    "this store's updates are hidden from a server that follows the protocol, not from one that "
                    "invents other stores: the policy pins no roster-key"
                )
            self._has_warned = True
            return None
        roster = keys.roster()
        return {} if roster is None else roster.keys()

    def handle(self, message: ServerMessage) -> ClientMessage:
        """See `rounds.client.Client.handle`."""
        if not isinstance(message, Setup) and self._opened is None and self._setup_file.exists():
            text = self._setup_file.read_text(encoding="utf-8")
            known = payload.decode(text, self.find_blob(payload.Header.parse(text).blob) or b"")
            if isinstance(known, Setup):
                self._client.handle(known)
        answer = self._encryption.before(message) or self._masking.before(message)
        if answer is None:
            plain = replace(message, masking="") if isinstance(message, Broadcast) else message
            own = self._client.handle(plain)
            if isinstance(own, Evaluation):
                self._evaluation = own if own.num_examples else None
            answer = self._masking.after(message, self._encryption.after(message, own))
        if isinstance(message, Setup) and isinstance(answer, Ready):
            blob = payload.blob_of(message)
            if blob.pieces:
                self._blobs.save(blob)
            write_atomically(self._setup_file, payload.encode_header(message, blob.digest if blob.pieces else ""))
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
        sums = self._opened is not None and self._opened.algorithm.counts_photos
        self._task_limits.accept(
            broadcast, num_photos=len(trainer.train), batch_size=configured, frozen=frozen, sums=sums
        )  # fmt: skip
        if self._photos is not None and broadcast.purpose is Purpose.TRAIN:
            self._photos.note()

    def _renew(self, broadcast: Broadcast, work: Work) -> Work:
        """Look for corrected photos, to train on them from this round on.

        Photos stay those of the setup where the server knows their number, or the noise was planned for it.
        """
        if self._photos is None or self._opened is None:
            return work
        fixed = work.mechanism is not None or work.algorithm.sums or broadcast.closed_form
        if not fixed:
            self._before_look(self._opened.catalogue)
        photos = self._photos.for_round(broadcast.key.round, fixed=fixed)
        if photos is work.trainer.train or work.mechanism is not None:
            return work
        trainer = replace(work.trainer, train=photos)
        self._policy.check_memory(_bytes_needed(self._opened, photos))
        self._check_photos(
            photos, len(photos) + len(trainer.validation), batch_size=trainer.bound_model.settings.batch_size
        )
        return replace(work, trainer=trainer, local_trainer=trainer)

    def _check(self, config: RunConfig) -> None:
        check_setup(self._policy, config)

    def _note(self, broadcast: Broadcast) -> None:
        self.took_part = True
        num_rounds = max(0, broadcast.key.round - (broadcast.purpose is Purpose.TRAIN))
        key = broadcast.counted or broadcast.key if broadcast.purpose is Purpose.EVALUATE else broadcast.key
        # A copy, because the next model is received into the same memory.
        self._newest, self._evaluation = (key, num_rounds, broadcast.params.clone()), None

    def _prepare(self, setup: Setup) -> Work:
        """Build the work. An error names no product to a server that this store tells none."""
        try:
            return self._build(setup)
        except DataError as error:
            if self._policy.metrics.class_names:
                raise
            logger.warning("%s", error)
            raise DataError("its photos do not suit this run; its own log says why") from error

    def _build(self, setup: Setup) -> Work:
        keep_freed_memory()
        limits = self._policy.limits
        self._newest, self._has_chosen, self._opened, self._photos = None, False, None, None
        with at_most(limits.max_parameters):
            self._opened = open_setup(setup, device=self._place.device, accept=self._check)
        if self._opened.encryption is not None:
            seal.require()
        if self._place.withdraw:
            return work_for(self._place.name, self._opened, NO_PHOTOS, batch_size=self._opened.config.batch_size)
        cache = PhotoCache(root=places.photo_cache(), max_bytes=limits.max_cache_mb * 1_000_000)
        log = TrainedPhotosLog(self._place.state_dir / FOLDER, setup.run_id)
        run_photos = RunPhotos(self._place.data_dir, self._opened, cache, store=self._place.name, log=log)
        self._before_look(self._opened.catalogue)
        photos = run_photos.load()
        test = None
        if self._place.test_dir is not None:  # checked now, because at the end of the run it would be too late
            opened = self._opened
            test = test_photos(
                self._place.test_dir, opened.config, opened.catalogue, cache, opened.bound_model,
                store=self._place.name, sales=photos.sales,
            )  # fmt: skip
        self._policy.check_memory(_bytes_needed(self._opened, photos.train))
        batch_size = self._batch_size(setup, self._opened, photos)
        num_photos = len(photos.train) + len(photos.validation) + photos.num_left_out
        self._check_photos(photos.train, num_photos, batch_size=batch_size or self._opened.config.batch_size)
        self._photos = run_photos
        return work_for(
            self._place.name, self._opened, photos, batch_size=batch_size, test=lambda: test, save=self._save,
            teacher=self._own_teacher(self._opened),
            training=self._training,
            budget=self._budget, per_product=self._policy.metrics.counts_products,
            features_folder=cache.root / FEATURES,
        )  # fmt: skip

    def _check_photos(self, train: PhotoSet, num_photos: int, *, batch_size: int) -> None:
        if self._opened is not None:
            self._policy.check_photos(
                num_train=len(train), num_photos=num_photos, batch_size=batch_size,
                epochs=most_epochs(self._opened.config),
            )  # fmt: skip

    def _save(self, opened: OpenedSetup, photos: StorePhotos, bound: BoundModel, comparison: Comparison) -> None:
        folder = places.client_model(self._place.state_dir)
        save_chosen(
            folder, bound, opened.config, opened.catalogue, client=self._place.name, comparison=comparison,
            sales=photos.sales,
        )  # fmt: skip
        self._has_chosen = True
        self._on_choice(comparison, folder)

    def _own_teacher(self, opened: OpenedSetup) -> Teacher | None:
        """The model that this store has chosen in the teacher's run: set aside, before another takes its place."""
        if opened.sent_teacher is None:
            return None
        chosen, aside = places.client_model(self._place.state_dir), self._place.state_dir / "teacher"
        for folder in (aside, chosen):
            found = own_teacher(folder, opened.sent_teacher, opened.catalogue.names, opened.bound_model.compute.device)
            if found is not None and folder is chosen:
                save_model(aside, *load_model_files(chosen))
            if found is not None:
                return found
        return None

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
    policy = policies.load(str(node_config.get("policy", "standard")))
    return join_of(place, names_classes=policy.metrics.class_names), StoreClient(place, policy=policy)


def _bytes_needed(opened: OpenedSetup, photos: PhotoSet) -> float:
    """Memory of a training step, with that of the teacher, if there is one."""
    found = bytes_needed(opened.bound_model, photos)
    if opened.teacher is None:
        return found
    return found + opened.teacher.bytes_needed(min(opened.bound_model.settings.batch_size, len(photos)))
