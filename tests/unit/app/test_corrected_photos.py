"""A client looks at its folder before each round: corrected photos are trained on from the next round on."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedshelf.app.client import StoreClient
from fedshelf.app.client_place import ClientPlace
from fedshelf.app.model import bound_model_of
from fedshelf.app.run_photos import RunPhotos
from fedshelf.app.setup import open_setup
from fedshelf.app.trained_photos import trained_on
from fedshelf.config import files
from fedshelf.config.schema import RunConfig
from fedshelf.core.messages import Broadcast, ClassFolder, Purpose, Ready, Setup, TaskKey, Upload
from fedshelf.data.cache import PhotoCache
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.photo_set import PhotoSet
from fedshelf.edge.serving.correction_journal import Correction, Status
from fedshelf.edge.serving.corrections import Corrections
from fedshelf.edge.serving.photo_copy import clean_copy
from fedshelf.storage.trained_photos import FOLDER, TrainedPhotosLog
from tests.edge_models import photo
from tests.unit.data.samples import write_pack
from tests.worlds import CLASSES

CATALOGUE = Catalogue.resolve({"a": [ClassFolder(leaf=name, path=name) for name in CLASSES]})
STORE, NUM_PHOTOS = Path("lyon"), 6 * len(CLASSES)


def config(**values: Any) -> RunConfig:
    given = {"image_size": 16, "width": 4, "batch_size": 8, "local_epochs": 1, "device": "cpu", "val_fraction": 0.0}
    return files.load(RunConfig, None, {**given, **values})


def setup_of(given: RunConfig, run_id: str = "r") -> Setup:
    digest = bound_model_of(given, CATALOGUE, device="cpu").params.layout.digest
    return Setup(run_id=run_id, config=files.for_clients(given), catalogue=CATALOGUE.to_json(), layout_digest=digest)


@pytest.fixture
def store(home: Path) -> Corrections:
    write_pack(STORE, dict.fromkeys(CLASSES, 6))
    return Corrections(STORE, labels=tuple(CLASSES), paths=tuple(CLASSES))


def correct(store: Corrections, shade: int, product: str = CLASSES[0]) -> Correction:
    data = photo((shade, 20, 90))
    return store.file(clean_copy(data), product, source=hashlib.sha256(data).hexdigest())


class Client:
    """A process of the store's client; a second one is the client after a restart."""

    def __init__(self, given: RunConfig, run_id: str = "r") -> None:
        self.run_id = run_id
        place = ClientPlace.of(STORE, name=None, state_dir=None, device="cpu")
        place.make_state_dir()
        self.client = StoreClient(place)
        setup = setup_of(given, run_id)
        self.client.ledger.intend(setup, [run_id.encode()])
        ready = self.client.handle(setup)
        assert isinstance(ready, Ready), ready
        self.ready = ready
        self.params = bound_model_of(given, CATALOGUE, device="cpu").params.shared

    def delta(self, round: int, attempt: int = 0) -> Tensor:
        delta = self.train(round, attempt).vectors["delta"]
        assert isinstance(delta, Tensor)
        return delta

    def train(self, round: int, attempt: int = 0) -> Upload:
        key = TaskKey(run_id=self.run_id, round=round, attempt=attempt)
        task = Broadcast(key=key, purpose=Purpose.TRAIN, vectors={"params": self.params}, client_lr=0.1)
        answer = self.client.handle(task)
        assert isinstance(answer, Upload), answer
        return answer


def test_a_corrected_photo_is_trained_on_in_the_next_round(store: Corrections) -> None:
    client = Client(config())
    assert client.train(1).num_examples == NUM_PHOTOS
    made = correct(store, 10)
    assert trained_on(STORE).first_round(made.photo, made.path) is None
    before = client.train(2)
    assert before.num_examples == NUM_PHOTOS + 1
    since = trained_on(STORE).first_round(made.photo, made.path)
    assert since is not None
    assert (since.run_id, since.round) == ("r", 2)
    assert client.train(3).num_examples == NUM_PHOTOS + 1


def test_the_photo_changes_what_is_learned_and_not_only_a_count(store: Corrections) -> None:
    one, same = (Client(config(), run).delta(3) for run in ("one", "same"))
    assert torch.equal(one, same)
    correct(store, 10)
    assert not torch.equal(Client(config(), "other").delta(3), one)


def test_a_repeated_round_is_trained_on_the_same_photos_after_a_restart_too(store: Corrections) -> None:
    client = Client(config())
    client.train(1)
    correct(store, 10)
    first = client.delta(2)
    correct(store, 20)
    for attempt, again in enumerate((client, Client(config())), start=1):
        assert torch.equal(again.delta(2, attempt), first)
        assert again.train(2, attempt).num_examples == NUM_PHOTOS + 1
    assert client.train(1, attempt=1).num_examples == NUM_PHOTOS
    assert client.train(3).num_examples == NUM_PHOTOS + 2


def test_a_correction_that_was_taken_back_is_not_trained_on_again(store: Corrections) -> None:
    client = Client(config())
    client.train(1)
    made = correct(store, 10)
    client.train(2)
    store.undo(made.id)
    assert client.train(3).num_examples == NUM_PHOTOS


def test_inbox_and_review_are_not_trained_on(store: Corrections) -> None:
    client = Client(config())
    assert correct(store, 10, "Unheard of").status is Status.INBOX
    assert client.train(1).num_examples == NUM_PHOTOS


def test_a_photo_of_a_product_outside_the_catalogue_waits_for_a_run_that_has_it(store: Corrections) -> None:
    client = Client(config())
    store.accept(correct(store, 10, "Unheard of").id)
    assert client.train(1).num_examples == NUM_PHOTOS


def test_the_receipt_counts_the_corrections_of_each_round(store: Corrections) -> None:
    client = Client(config())
    made = [correct(store, shade) for shade in (10, 20, 30)]
    client.train(1)
    made.append(correct(store, 40))
    client.train(2)
    receipts = trained_on(STORE).receipts((c.photo, c.path) for c in made)
    assert receipts == ["3 corrections were first in round 1 of r", "1 correction was first in round 2 of r"]


def test_a_new_run_begins_with_all_photos(store: Corrections) -> None:
    Client(config()).train(1)
    made = correct(store, 10)
    other = Client(config(), "s")
    assert other.ready.num_train == NUM_PHOTOS + 1
    other.train(1)
    since = trained_on(STORE).first_round(made.photo, made.path)
    assert since is not None
    assert since.run_id == "s"


def test_a_run_with_planned_noise_keeps_the_photos_of_its_setup(store: Corrections) -> None:
    given = config(dp="sample", noise_multiplier=1.0, clip_norm=1.0, norm="group")
    client = Client(given)
    steps = client.train(1).num_steps
    for shade in range(10, 90, 5):
        correct(store, shade)
    later = client.train(2)
    assert later.num_steps == steps
    assert trained_on(STORE).runs[0].changes[1].added == frozenset()


def test_a_folder_that_is_away_for_a_while_ends_no_run(store: Corrections, caplog: pytest.LogCaptureFixture) -> None:
    client = Client(config())
    client.train(1)
    STORE.rename("unmounted")
    assert client.train(2).num_examples == NUM_PHOTOS
    assert "round 2 is trained on the photos of the round before" in caplog.text
    Path("unmounted").rename(STORE)
    correct(store, 10)
    assert client.train(3).num_examples == NUM_PHOTOS + 1


@pytest.fixture
def run_photos(store: Corrections, home: Path) -> "Opened":
    return Opened()


class Opened:
    """The photos of one run, opened again as by a new process."""

    def __init__(self) -> None:
        self.opened = open_setup(setup_of(config(val_fraction=0.3)), device="cpu")
        self.cache = PhotoCache(root=Path("cache").absolute())

    def open(self, folder: Path = STORE) -> RunPhotos:
        log = TrainedPhotosLog(Path("state").absolute() / FOLDER, "r")
        return RunPhotos(folder.absolute(), self.opened, self.cache, store="lyon", log=log)


def contents(photos: PhotoSet) -> set[tuple[bytes, int]]:
    return {(image.tobytes(), int(label)) for image, label in zip(photos.images, photos.labels, strict=True)}


def test_validation_photos_never_move_to_training_in_a_run(run_photos: Opened, store: Corrections) -> None:
    Path("state").mkdir()
    first = run_photos.open()
    at_setup = first.load()
    assert len(at_setup.validation) >= 3
    for shade in range(5, 250, 8):
        correct(store, shade)
    for process in (first, run_photos.open()):
        again = process.load()
        assert contents(again.validation) == contents(at_setup.validation)
        now = process.for_round(1)
        assert len(now) == len(at_setup.train) + 31
        assert not contents(now) & contents(at_setup.validation)


def test_photos_with_a_validation_folder_of_their_own_keep_it(run_photos: Opened, home: Path) -> None:
    Path("state").mkdir()
    write_pack(Path("split/train"), dict.fromkeys(CLASSES, 4))
    write_pack(Path("split/val"), dict.fromkeys(CLASSES, 2))
    photos = run_photos.open(Path("split"))
    loaded = photos.load()
    made = correct(Corrections(Path("split"), labels=tuple(CLASSES), paths=tuple(CLASSES)), 10)
    assert made.path.startswith("train/")
    assert len(photos.for_round(1)) == len(loaded.train) + 1
    photos.note()
    log = TrainedPhotosLog(Path("state").absolute() / FOLDER, "r")
    assert len(log.changes[0].added) == len(loaded.train) + 1


def test_a_round_is_noted_before_it_is_trained_and_an_unchanged_folder_is_not_loaded_again(
    run_photos: Opened, home: Path
) -> None:
    Path("state").mkdir()
    photos = run_photos.open()
    loaded = photos.load()
    assert photos.for_round(1) is loaded.train
    log = TrainedPhotosLog(Path("state").absolute() / FOLDER, "r")
    assert log.changes == []
    photos.note()
    log = TrainedPhotosLog(Path("state").absolute() / FOLDER, "r")
    assert [change.round for change in log.changes] == [1]


@pytest.mark.parametrize("damage", ['{"round": 2, "added": ["x', "", "nonsense\n", "[]\n", '{"round": 2}\n'])
def test_a_damaged_or_incomplete_file_ends_no_client(run_photos: Opened, damage: str, home: Path) -> None:
    Path("state").mkdir()
    photos = run_photos.open()
    photos.load()
    photos.for_round(1)
    photos.note()
    (path,) = (Path("state") / FOLDER).iterdir()
    with path.open("a") as file:
        file.write(damage)
    again = run_photos.open()
    assert len(again.load().train) > 0
    again.for_round(2)
    again.note()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["run"] == "r"
    assert lines[-1]["round"] == 2


def test_only_the_newest_runs_are_kept(home: Path) -> None:
    folder = Path("state").absolute()
    for number in range(8):
        TrainedPhotosLog(folder, f"run/{number}").start([])
    assert len(list(folder.iterdir())) == 5
    assert TrainedPhotosLog(folder, "run/7").validation == frozenset()
