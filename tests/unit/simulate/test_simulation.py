"""A whole federation in one process and in workers: the same bits, whatever plays the clients."""

import csv
import json
import os
import pickle
import resource
import threading
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedshelf.app.predictor import Predictor
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import DataError, FedShelfError, RunError, UsageError
from fedshelf.core.events import ClientJoined, ClientRefused, RoundFinished, RoundStarted, RoundVoid, RunStatus
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.decode import decode
from fedshelf.data.photo_set import PhotoSet
from fedshelf.simulate.engine import simulate, simulate_in_memory
from fedshelf.simulate.stores import MemoryStores
from fedshelf.storage.checkpoints import FileCheckpoints
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.tracking.queries import run_summary
from tests.fakes import RecordingSink
from tests.unit.data.samples import write_pack, write_photo

SIZE = 16
CLASSES = ("apple", "milk", "tea")


@pytest.fixture
def stores(home: Path) -> Path:
    for number, name in enumerate(("lyon", "oslo", "rome")):
        write_pack(Path("stores") / name, {c: 3 + number + i for i, c in enumerate(CLASSES[: 2 + number % 2])})
    write_pack(Path("test"), dict.fromkeys(CLASSES, 2))
    return Path("stores")


def config(**values: Any) -> RunConfig:
    given: dict[str, Any] = {
        "data_dir": Path("stores"), "test_dir": Path("test"), "image_size": SIZE, "width": 8, "rounds": 2,
        "batch_size": 4, "device": "cpu", "val_fraction": 0.2,
    }  # fmt: skip
    return RunConfig(**{**given, **values})


def final(directory: RunDirectory) -> torch.Tensor:
    state = FileCheckpoints(directory.checkpoints).load()
    assert state is not None
    return state.model.params


def test_two_runs_of_one_seed_are_equal_to_the_last_bit_and_of_two_seeds_are_not(stores: Path) -> None:
    results = []
    for number, seed in enumerate((0, 0, 1)):
        sink = RecordingSink()
        status, directory = simulate(config(seed=seed, run_dir=Path(f"r{number}")), watchers=(sink,))
        assert status is RunStatus.FINISHED
        records = [(r.accuracy, r.central_accuracy, r.train_loss, r.bytes_up, r.bytes_down)
                   for r in sink.of(RoundFinished)]  # fmt: skip
        results.append((final(directory), records))
    assert torch.equal(results[0][0], results[1][0])
    assert [r[:3] for r in results[0][1]] == [r[:3] for r in results[1][1]]
    assert not torch.equal(results[0][0], results[2][0])
    assert all(value is not None for record in results[0][1] for value in record)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["fedavg", "fedprox"])
def test_worker_processes_change_not_one_bit(stores: Path, algorithm: Any) -> None:
    finals, records = [], []
    for workers in (0, 2):
        sink = RecordingSink()
        given = config(workers=workers, run_dir=Path(f"w{workers}"), algorithm=algorithm, mu=0.5)
        _, directory = simulate(given, watchers=(sink,))
        finals.append(final(directory))
        records.append([(r.accuracy, r.central_accuracy, r.central_loss, r.train_loss) for r in sink.of(RoundFinished)])
    assert torch.equal(*finals)
    assert records[0] == records[1]


def crashing(num_classes: int) -> nn.Module:
    """A model that takes its process with it, but for the test's own."""
    if os.getpid() != MAIN:
        os._exit(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, num_classes))


class Failing(nn.Module):
    """A model that raises in training, once it is in a worker."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3 * SIZE * SIZE, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise ValueError("the model is broken")


MAIN = int(os.environ.setdefault("FEDSHELF_TEST_MAIN", str(os.getpid())))  # workers inherit it
MEMORY = {
    name: PhotoSet(
        np.random.default_rng(i).integers(0, 256, (6, SIZE, SIZE, 3), dtype=np.uint8), np.arange(6, dtype=np.int64) % 3
    )
    for i, name in enumerate("ab")
}


@pytest.mark.slow
@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("model", "why"), [(crashing, "process( of [ab])? ended with exit code 3"), (Failing, "the model is broken")]
)
def test_a_worker_that_crashes_is_one_clear_error(model: Any, why: str) -> None:
    given = config(data_dir=None, test_dir=None, workers=2, rounds=1)
    with pytest.raises(FedShelfError, match=why):
        simulate_in_memory(given, stores=MEMORY, test=None, class_names=CLASSES, model=model)


def test_stores_in_memory_give_what_stores_in_folders_give(stores: Path) -> None:
    """Without validation photos, since in memory there is no split."""
    _, from_folders = simulate(config(val_fraction=0.0, run_dir=Path("folders")))
    catalogue = Catalogue.load(from_folders.catalogue)

    def photo_set(folder: Path) -> PhotoSet:
        files = sorted(folder.rglob("*.png"))
        labels = [catalogue.names.index(file.parent.name) for file in files]
        return PhotoSet(np.stack([decode(f.read_bytes(), SIZE) for f in files]), np.array(labels, dtype=np.int64))

    _, in_memory = simulate_in_memory(
        config(data_dir=None, test_dir=None, val_fraction=0.0, run_dir=Path("memory")),
        stores={folder.name: photo_set(folder) for folder in Path("stores").iterdir()},
        test=photo_set(Path("test")), class_names=catalogue.names,
    )  # fmt: skip
    assert torch.equal(final(from_folders), final(in_memory))


class StopAt:
    def __init__(self, round: int) -> None:
        self.round, self.stop = round, threading.Event()

    def emit(self, event: Any) -> None:
        if isinstance(event, RoundStarted | RoundFinished) and event.round == self.round:
            self.stop.set()


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_run_that_is_stopped_and_gone_on_with_equals_an_uninterrupted_one(stores: Path, at: int) -> None:
    _, whole = simulate(config(rounds=3, run_dir=Path("whole")))
    stopper = StopAt(at)
    status, _ = simulate(config(rounds=3, run_dir=Path("r")), watchers=(stopper,), stop=stopper.stop)
    assert status is RunStatus.STOPPED
    status, resumed = simulate(config(rounds=3, run_dir=Path("r")))
    assert status is RunStatus.FINISHED
    assert torch.equal(final(resumed), final(whole))


class FullDisk:
    """Lets no file of this process grow beyond 128 KiB, less than a checkpoint, once round 1 is finished."""

    def emit(self, event: Any) -> None:
        if isinstance(event, RoundFinished):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_run_that_a_full_disk_ended_says_so_afterwards(stores: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(RunError, match="cannot write"):
            simulate(config(run_dir=Path("r")), watchers=(FullDisk(),))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    summary = run_summary(Path("r"))
    assert summary.status is RunStatus.FAILED
    assert "cannot write" in summary.reason
    status, _ = simulate(config(run_dir=Path("r")))
    assert status is RunStatus.FINISHED


def test_a_run_extended_equals_a_longer_run_where_the_rate_is_constant(stores: Path) -> None:
    constant = {"lr_schedule": "constant", "warmup_rounds": 0}
    _, long = simulate(config(rounds=3, run_dir=Path("long"), **constant))
    simulate(config(rounds=2, run_dir=Path("r"), **constant))
    _, extended = simulate(config(rounds=2, extend=1, run_dir=Path("r"), **constant))
    assert torch.equal(final(extended), final(long))


def test_the_published_model_names_products_in_photos(stores: Path) -> None:
    sink = RecordingSink()
    _, directory = simulate(config(), watchers=(sink,))
    labels = json.loads((directory.model / "labels.json").read_text())
    card = json.loads((directory.model / "model_card.json").read_text())
    assert labels == list(CLASSES)
    last = sink.of(RoundFinished)[-1]
    assert card["metrics"]["central_accuracy"] == last.central_accuracy
    assert (card["round"], card["input"]["image_size"]) == (2, SIZE)
    assert (directory.best_model / "model.safetensors").exists()
    predictor = Predictor.load(directory.model)
    tested = [(photo, predictor.predict(photo, top=5)) for photo in sorted(Path("test").rglob("*.png"))]
    for _, guesses in tested:
        assert len(guesses) == 3
        assert sum(guess.probability for guess in guesses) == pytest.approx(1, abs=1e-5)
        assert [g.probability for g in guesses] == sorted((g.probability for g in guesses), reverse=True)
    right = sum(guesses[0].label == photo.parent.name for photo, guesses in tested)
    assert right / len(tested) == last.central_accuracy


def test_a_run_over_nested_folders_has_results_by_product_and_level(home: Path) -> None:
    products = ("Fruit/Apple/Gala", "Fruit/Apple/Pink", "Fruit/Kiwi", "Dairy/Milk")
    for number, name in enumerate(("lyon", "oslo")):
        write_pack(Path("stores") / name, {path: 8 + number + i for i, path in enumerate(products)})
    write_pack(Path("test"), dict.fromkeys(products, 3))
    sink = RecordingSink()
    _, directory = simulate(config(val_fraction=0.25), watchers=(sink,))
    shown = json.loads(json.dumps(run_summary(directory.path).to_record()))
    last = shown["rounds"][-1]
    correct, total = (sum(found[key] for found in shown["products"]) for key in ("correct", "total"))
    assert total == sum(event.num_validation or 0 for event in sink.of(ClientJoined))
    assert correct / total == last["accuracy"]
    accuracies = [level["accuracy"] for level in shown["levels"]]
    assert len(accuracies) == 3
    assert accuracies[-1] == last["central_accuracy"]
    assert accuracies == sorted(accuracies, reverse=True)
    rows = list(csv.DictReader((directory.path / "confusion.csv").read_text().splitlines()))
    assert sum(int(row["photos"]) for row in rows) == 12
    assert sum(int(row["photos"]) for row in rows if row["product"] == row["predicted"]) == 12 * accuracies[-1]
    metrics = json.loads((directory.model / "model_card.json").read_text())["metrics"]
    assert [metrics[key] for key in ("products", "levels")] == [shown[key] for key in ("products", "levels")]
    assert metrics["mixed_up"] == shown["confusion"]
    fruit, apple, guesses = Predictor.load(directory.model).predict_levels(next(Path("test").rglob("*.png")), top=9)
    found = {guess.label: guess.probability for guess in (*fruit, *apple, *guesses)}
    assert found["Fruit/Apple"] == pytest.approx(found["Gala"] + found["Pink"])
    assert found["Fruit"] == pytest.approx(1 - found["Milk"])
    assert len(found) == 2 + 3 + 4


def test_photos_of_no_class_in_the_catalogue_are_left_out_and_counted(stores: Path) -> None:
    Path("catalogue.txt").write_text("apple\nmilk\n")
    sink = RecordingSink()
    simulate(config(catalogue=Path("catalogue.txt"), rounds=1), watchers=(sink,))
    left_out = {e.client: e.num_left_out for e in sink.of(ClientJoined)}
    assert left_out == {"lyon": 0, "oslo": 6, "rome": 0}


def test_fewer_stores_than_clients_asked_for_is_a_usage_error_and_not_an_endless_wait(stores: Path) -> None:
    with pytest.raises(UsageError, match=r"--min-clients 4: there are only 3 stores \('lyon', 'oslo', 'rome'\)"):
        simulate(config(min_clients=4))
    with pytest.raises(UsageError, match=r"--quorum 4: there are only 3 stores .*Choose a smaller number, or add"):
        simulate(config(quorum=4))
    assert not Path("runs").exists()


def test_a_store_alone_can_be_simulated(home: Path) -> None:
    write_pack(Path("stores/only"), {"apple": 4, "milk": 4})
    status, _ = simulate(config(min_clients=1, test_dir=None))
    assert status is RunStatus.FINISHED


def test_a_store_that_cannot_take_part_ends_the_simulation_instead_of_an_endless_wait(stores: Path) -> None:
    write_pack(Path("stores/zoo"), {"tiger": 3})
    Path("catalogue.txt").write_text("apple\nmilk\ntea\n")
    with pytest.raises(RunError, match="waits for more clients"):
        simulate(config(catalogue=Path("catalogue.txt")))


def test_missing_stores_are_clear_errors(home: Path) -> None:
    with pytest.raises(UsageError, match="--data-dir is missing"):
        simulate(config(data_dir=None))
    with pytest.raises(UsageError, match=r"--data-dir .*stores: no such folder"):
        simulate(config())
    Path("stores").mkdir()
    with pytest.raises(DataError, match="contains no folders"):
        simulate(config())
    write_photo(Path("stores/a/x.png"))
    write_photo(Path("stores/b/apple/x.png"))
    with pytest.raises(DataError, match=r"'.*stores/a'.*directly"):
        simulate(config())
    write_photo(Path("stores/a/apple/x.png"))
    with pytest.raises(UsageError, match=r"--test-dir .*: no such folder"):
        simulate(config())


def test_a_test_folder_of_other_products_is_an_error(stores: Path) -> None:
    write_pack(Path("other"), {"tiger": 2})
    with pytest.raises(DataError, match="--test-dir"):
        simulate(config(test_dir=Path("other")))


def test_a_diverging_client_fails_by_name_and_the_run_says_so(stores: Path) -> None:
    sink = RecordingSink()
    with pytest.raises(RunError, match=r"no client is left.*lower --client-lr"):
        simulate(config(client_lr=1e30, warmup_rounds=0, gradient_clip=0.0), watchers=(sink,))
    reasons = {m.reason for v in sink.of(RoundVoid) for m in v.clients}
    assert any("diverged" in reason for reason in reasons)


def test_a_model_that_a_client_holds_already_costs_no_bytes(stores: Path) -> None:
    """Round 1 sends two models to each client (to train, to evaluate), round 2 only the one it leads to."""
    sink = RecordingSink()
    _, directory = simulate(config(run_dir=Path("r")), watchers=(sink,))
    first, second = (record.bytes_down for record in sink.of(RoundFinished))
    model = 4 * final(directory).numel()
    assert first > 3 * 2 * model
    assert 3 * model < second < 3 * model + 10_000
    assert first - second == pytest.approx(3 * model, abs=5_000)


@pytest.mark.usefixtures("home")
def test_stores_in_memory_hold_out_photos_as_val_fraction_says(home: Path) -> None:
    joined, digests = [], []
    for workers in (0, 2):
        sink = RecordingSink()
        given = config(data_dir=None, test_dir=None, rounds=1, val_fraction=0.4, workers=workers)
        simulate_in_memory(given, stores=MEMORY, test=None, class_names=CLASSES, watchers=(sink,))
        joined.append([(event.num_train or 0, event.num_validation or 0) for event in sink.of(ClientJoined)])
        (finished,) = sink.of(RoundFinished)
        assert finished.accuracy is not None
        digests.append(finished.model_digest)
    assert joined[0] == joined[1]
    assert all(train + validation == 6 and 1 <= validation <= 3 for train, validation in joined[0])
    assert digests[0] == digests[1]
    source = MemoryStores(MEMORY, None, CLASSES, val_fraction=0.4)
    copied, catalogue = pickle.loads(ForkingPickler.dumps(source)), Catalogue(CLASSES, tuple((c,) for c in CLASSES))
    assert [copied.num_photos(name, catalogue) for name in "ab"] == joined[0]


def test_a_catalogue_that_changed_since_does_not_change_the_run(stores: Path) -> None:
    catalogue = Path("catalogue.txt")
    catalogue.write_text("apple\nmilk\ntea\n")
    simulate(config(catalogue=catalogue, run_dir=Path("r")))
    catalogue.write_text("tea\nmilk\napple\n")
    status, directory = simulate(config(catalogue=catalogue, run_dir=Path("r"), extend=1))
    assert status is RunStatus.FINISHED
    assert json.loads((directory.model / "labels.json").read_text()) == list(CLASSES)


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("workers", [0, 2])
def test_photos_in_memory_of_products_that_the_catalogue_lacks_are_left_out(workers: int) -> None:
    Path("names.txt").write_text("tea\napple\nsoap\n")
    only_milk = PhotoSet(MEMORY["a"].images, np.ones(6, dtype=np.int64))
    sink = RecordingSink()
    given = config(data_dir=None, test_dir=None, rounds=1, catalogue=Path("names.txt"), workers=workers, val_fraction=0)
    status, _ = simulate_in_memory(
        given, stores=MEMORY, test=MEMORY["b"], class_names=CLASSES, watchers=(sink,)
    )  # fmt: skip
    assert status is RunStatus.FINISHED
    assert [(e.client, e.num_train, e.num_left_out) for e in sink.of(ClientJoined)] == [("a", 4, 2), ("b", 4, 2)]
    assert [member.num_examples for member in sink.of(RoundFinished)[0].clients] == [4, 4]
    with pytest.raises(FedShelfError, match="waits for more clients"):
        simulate_in_memory(
            given.model_copy(update={"run_dir": Path("milk")}), stores={**MEMORY, "c": only_milk}, test=None,
            class_names=CLASSES, watchers=(sink,),
        )  # fmt: skip
    (refused,) = sink.of(ClientRefused)
    assert (refused.client, refused.reason) == ("c", "it holds no training photo of a class in the run's catalogue")
