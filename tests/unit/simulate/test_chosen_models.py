"""After a simulated run: what stores have chosen is in the table, on disk, and the same whoever has played them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedshelf.app.photos import store_photos
from fedshelf.app.photos import test_photos as load_test_photos
from fedshelf.app.predictor import Predictor
from fedshelf.app.setup import open_setup
from fedshelf.config import files, places
from fedshelf.config.schema import RunConfig
from fedshelf.core.choices import Candidate, EngineName
from fedshelf.core.events import RunStatus
from fedshelf.core.messages import Setup
from fedshelf.data.cache import PhotoCache
from fedshelf.data.catalogue import Catalogue
from fedshelf.simulate.engine import simulate
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.tracking.queries import run_summary
from fedshelf.training.photo_scores import of_classes, reweighted_accuracy, score_photos
from tests.unit.data.samples import write_pack

CLASSES = ("apple", "milk", "tea")
NAMES = ("lyon", "oslo", "rome")


@pytest.fixture
def stores(home: Path) -> Path:
    for number, name in enumerate(NAMES):
        write_pack(Path("stores") / name, {c: 4 + number + i for i, c in enumerate(CLASSES[: 2 + number % 2])})
    write_pack(Path("test"), dict.fromkeys(CLASSES, 3))
    return Path("stores")


def config(**values: Any) -> RunConfig:
    given: dict[str, Any] = {
        "data_dir": Path("stores"), "test_dir": Path("test"), "image_size": 16, "width": 8, "rounds": 2,
        "batch_size": 4, "device": "cpu", "val_fraction": 0.2, "personalize": "finetune",
    }  # fmt: skip
    return RunConfig(**{**given, **values})


def run(name: str, **values: Any) -> RunDirectory:
    status, directory = simulate(config(run_dir=Path(name), **values))
    assert status is RunStatus.FINISHED
    return directory


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("method", ["none", "fedbn", "finetune"])
def test_every_store_has_a_whole_model_whose_accuracy_is_the_one_reported(stores: Path, method: str) -> None:
    """Loaded from its files alone, and judged by hand."""
    directory = run("r", personalize=method, compare=True)
    given = config(personalize=method)
    catalogue = Catalogue.load(directory.catalogue)
    opened = open_setup(
        Setup(run_id="r", config=files.for_clients(given), catalogue=catalogue.to_json(), layout_digest=""),
        device="cpu",
    )  # fmt: skip
    cache = PhotoCache(root=places.photo_cache())
    test = load_test_photos(Path("test"), given, catalogue, cache, opened.bound_model)
    found = {store.client: store for store in run_summary(directory.path).stores}
    assert sorted(found) == sorted(NAMES)
    for name, store in found.items():
        opened.bound_model.module.load_state_dict(weights(directory.stores / name))
        photos = store_photos(stores / name, opened, cache, store=name)
        own = torch.cat([torch.from_numpy(part.labels) for part in (photos.train, photos.validation)]).numpy()
        sold = of_classes(test, own)
        right = score_photos(opened.bound_model, sold).right
        assert store.best is not None
        assert reweighted_accuracy(right, sold.labels, own) == store.accuracies[store.best]
        card = json.loads((directory.stores / name / "model_card.json").read_text())
        assert (card["candidate"], card["store"], card["run_id"]) == (store.best.value, name, directory.run_id)
        guesses = Predictor.load(directory.stores / name).predict(next(Path("test").rglob("*.png")), top=3)
        assert sum(guess.probability for guess in guesses) == pytest.approx(1, abs=1e-5)


def test_a_store_that_keeps_the_global_model_has_the_one_that_the_run_published(stores: Path) -> None:
    directory = run("r", personalize="none", compare=True, client_lr=1e-6, warmup_rounds=0, seed=1)
    kept = {store.client: store.best for store in run_summary(directory.path).stores}
    published = weights(directory.model)
    for name, best in kept.items():
        same = all(torch.equal(tensor, published[key]) for key, tensor in weights(directory.stores / name).items())
        assert same is (best is Candidate.GLOBAL)


@pytest.mark.slow
def test_whoever_plays_the_stores_they_choose_and_keep_the_same(stores: Path) -> None:
    alone, workers = run("alone", personalize="ditto"), run("workers", personalize="ditto", workers=2)
    assert run_summary(alone.path).stores == run_summary(workers.path).stores
    for name in NAMES:
        first, second = weights(alone.stores / name), weights(workers.stores / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("engine", ["local", "vmap"])
def test_every_engine_compares(stores: Path, engine: EngineName) -> None:
    directory = run("r", engine=engine, norm="group")
    assert all(store.best is not None for store in run_summary(directory.path).stores)


def test_without_personalization_nothing_is_compared_unless_asked_for(stores: Path) -> None:
    directory = run("r", personalize="none")
    assert run_summary(directory.path).stores == ()
    assert not directory.stores.exists()
    run("r", personalize="none", compare=True)
    assert [store.client for store in run_summary(directory.path).stores] == sorted(NAMES)


def test_a_personalized_run_can_do_without(stores: Path) -> None:
    assert run_summary(run("r", compare=False).path).stores == ()


def test_without_test_photos_the_table_is_of_validation_photos(stores: Path) -> None:
    found = run_summary(run("r", test_dir=None).path).stores
    assert not any(store.on_test for store in found)
    assert all(store.accuracies[Candidate.LOCAL] is not None for store in found)
