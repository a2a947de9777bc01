"""`--dynamic-batch`, from the flag to what clients train with and what is told of it."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedshelf.app.client import StoreClient
from fedshelf.app.client_place import ClientPlace
from fedshelf.app.model import bound_model_of
from fedshelf.app.photos import StorePhotos
from fedshelf.app.setup import open_setup
from fedshelf.app.work import work_for
from fedshelf.config import files
from fedshelf.config.schema import RunConfig
from fedshelf.core.choices import EngineName
from fedshelf.core.errors import UsageError
from fedshelf.core.events import RunStatus
from fedshelf.core.messages import Broadcast, ClassFolder, Purpose, Setup, TaskKey, Upload
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.photo_set import PhotoSet
from fedshelf.simulate.engine import simulate_in_memory
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.tracking.queries import run_summary
from fedshelf.training import batch_size
from tests.unit.data.samples import write_pack
from tests.worlds import CLASSES, photos

CATALOGUE = Catalogue.resolve({"a": [ClassFolder(leaf=name, path=name) for name in CLASSES]})
DOUBLE = {4: 1.0, 8: 0.5, 16: 0.5}
"""Seconds per photo of a machine that is fastest with twice the configured batch size, 4."""


def config(**values: Any) -> RunConfig:
    given = {"image_size": 16, "width": 4, "batch_size": 4, "local_epochs": 1, "device": "cpu", "dynamic_batch": True}
    return files.load(RunConfig, None, {**given, **values})


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine of known speed; counts its measurements."""
    measured: list[int] = []

    def measure(bench: object, store: PhotoSet, sizes: object) -> Mapping[int, float]:
        measured.append(len(store))
        return DOUBLE

    monkeypatch.setattr(batch_size, "measure", measure)
    return measured


def setup_of(given: RunConfig, run_id: str = "r") -> Setup:
    digest = bound_model_of(given, CATALOGUE, device="cpu").params.layout.digest
    return Setup(run_id=run_id, config=files.for_clients(given), catalogue=CATALOGUE.to_json(), layout_digest=digest)


def test_a_client_trains_with_its_own_batch_size_and_others_with_theirs(machine: list[int]) -> None:
    opened = open_setup(setup_of(config()), device="cpu")
    trainers = {
        count: work_for(
            "a", opened, StorePhotos(train=photos(1, count, size=16), validation=photos(2, 3, size=16))
        ).trainer
        for count in (80, 40)
    }
    assert {n: (t.bound_model.settings.batch_size, t.growth, t.lr_scale) for n, t in trainers.items()} == {
        80: (8, 2, 2.0), 40: (4, 1, 1.0),
    }  # fmt: skip
    assert opened.bound_model.settings.batch_size == 4
    assert trainers[80].bound_model.params is opened.bound_model.params
    assert machine == [80]


def test_nothing_is_measured_unless_it_is_asked_for(machine: list[int]) -> None:
    opened = open_setup(setup_of(config(dynamic_batch=False)), device="cpu")
    store = StorePhotos(train=photos(1, 80, size=16), validation=photos(2, 3, size=16))
    found = work_for("a", opened, store).trainer
    assert (found.bound_model, found.lr_scale, machine) == (opened.bound_model, 1.0, [])
    assert RunConfig().dynamic_batch is False


def test_a_client_that_was_restarted_takes_the_batch_size_that_it_had(home: Path, machine: list[int]) -> None:
    write_pack(Path("lyon"), dict.fromkeys(CLASSES, 22))
    place = ClientPlace.of(Path("lyon"), name=None, state_dir=None, device="cpu")
    kept = place.state_dir / "batch-size.json"
    given, rounds = config(val_fraction=0.0), itertools.count(1)

    def upload(run_id: str = "r") -> Upload:
        """What a new process of the client answers to a task."""
        client, setup = StoreClient(place), setup_of(given, run_id)
        client.ledger.intend(setup, [run_id.encode()])
        client.handle(setup)
        params = bound_model_of(given, CATALOGUE, device="cpu").params.shared
        key = TaskKey(run_id=run_id, round=next(rounds), attempt=0)
        answer = client.handle(Broadcast(key=key, purpose=Purpose.TRAIN, vectors={"params": params}, client_lr=0.1))
        assert isinstance(answer, Upload), answer
        assert (answer.batch_size, answer.client_lr, answer.num_steps) == (8, 0.2, 9)
        return answer

    upload()
    upload()
    assert machine == [66]
    for damage in ("", "[]", '{"measured_for": 1}', kept.read_text().replace("8}", "-8}"), '"x"'):
        kept.write_text(damage)
        before = len(machine)
        upload()
        assert len(machine) == before + 1, damage
        assert json.loads(kept.read_text())["batch_size"] == 8
    upload("another run")
    assert len(machine) == 7


@pytest.mark.parametrize("engine", ["vmap", "auto"])
def test_clients_in_one_computation_cannot_differ(tmp_path: Path, engine: EngineName) -> None:
    stores = {"a": photos(1, 40, size=16), "b": photos(2, 40, size=16)}
    with pytest.raises(UsageError, match=f"--dynamic-batch with --engine {engine}: .*--engine local"):
        simulate_in_memory(
            config(engine=engine, run_dir=tmp_path / "run"), stores=stores, test=None, class_names=CLASSES
        )
    assert not (tmp_path / "run").exists()


def simulated(run_dir: Path, stores: Mapping[str, PhotoSet], **values: Any) -> RunDirectory:
    given = config(run_dir=run_dir, rounds=2, warmup_rounds=0, val_fraction=0.0, **values)
    status, directory = simulate_in_memory(given, stores=stores, test=None, class_names=CLASSES)
    assert status is RunStatus.FINISHED
    return directory


def test_a_run_of_clients_with_doubled_batches_is_the_run_that_was_told_so(tmp_path: Path, machine: list[int]) -> None:
    """Bit for bit: batch size and rate are all that the flag changes. What they were is recorded."""
    stores = {"a": photos(1, 70, size=16), "b": photos(2, 66, size=16)}
    found = simulated(tmp_path / "found", stores, client_lr=0.05)
    told = simulated(tmp_path / "told", stores, client_lr=0.1, batch_size=8, dynamic_batch=False)
    models = [load_file(run.model / "model.safetensors") for run in (found, told)]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
    rates = []
    for run in (found, told):
        clients = [client for round_ in run_summary(run.path).rounds for client in round_.clients]
        assert [client.batch_size for client in clients] == [8] * 4
        rates.append([client.client_lr for client in clients])
    assert rates[0] == rates[1] == [0.1, 0.1, 0.05, 0.05]
    assert len(machine) == 1


def test_a_real_measurement_leaves_a_run_that_takes_the_configured_size_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured in earnest before the first round; then the configured size is taken."""
    asked = []

    def first(seconds: Mapping[int, float]) -> int:
        asked.append(sorted(seconds))
        return 4

    monkeypatch.setattr(batch_size, "fastest", first)
    stores = {"a": photos(1, 70, size=16), "b": photos(2, 130, size=16)}
    models = [
        load_file(simulated(tmp_path / str(flag), stores, dynamic_batch=flag).model / "model.safetensors")
        for flag in (True, False)
    ]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
    assert {tuple(sizes) for sizes in asked} == {(4, 8), (4, 8, 16)}
    assert not np.isnan(models[0]["head.weight"].numpy()).any()
