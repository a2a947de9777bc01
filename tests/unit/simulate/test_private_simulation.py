"""Simulated federations with differential privacy: real training, real noise, and what the run says of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedshelf.config.schema import RunConfig
from fedshelf.privacy.accounting import SampledGaussian, compose
from fedshelf.simulate.engine import simulate
from fedshelf.storage.checkpoints import FileCheckpoints
from fedshelf.storage.model_files import CARD
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.tracking.queries import run_summary
from tests.unit.data.samples import write_pack
from tests.unit.tracking.test_runs_commands import output

CLASSES = ("apple", "milk")


@pytest.fixture
def stores(home: Path) -> Path:
    for number, name in enumerate(("lyon", "oslo", "rome")):
        write_pack(Path("stores") / name, dict.fromkeys(CLASSES, 5 + number))
    write_pack(Path("test"), dict.fromkeys(CLASSES, 2))
    return Path("stores")


def run(name: str, **values: Any) -> RunDirectory:
    given: dict[str, Any] = {
        "data_dir": Path("stores"), "test_dir": Path("test"), "image_size": 16, "width": 8, "rounds": 2,
        "batch_size": 4, "device": "cpu", "norm": "group", "run_dir": Path(name), "augment": False, "momentum": 0.0,
    }  # fmt: skip
    simulate(RunConfig(**{**given, **values}))
    return RunDirectory.open(Path(name))


def final(directory: RunDirectory) -> torch.Tensor:
    state = FileCheckpoints(directory.checkpoints).load()
    assert state is not None
    return state.model.params


def shown(directory: RunDirectory) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output("show", str(directory.path), "--json"))["privacy"]
    return found


@pytest.mark.usefixtures("stores")
@pytest.mark.parametrize("given", [{}, {"algorithm": "scaffold"}, {"personalize": "fedper"}, {"workers": 2}], ids=str)
def test_noise_in_the_stores_covers_every_upload_and_is_reported(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = run("run", dp="sample", noise_multiplier=1.5, compare=False, **given)
    summary = run_summary(directory.path)
    assert {record.train_loss for record in summary.rounds} == {None}  # figures without noise stay in the stores
    assert {record.accuracy for record in summary.rounds} == {None}
    assert all(record.central_accuracy is not None for record in summary.rounds) is ("personalize" not in given)
    assert {"lyon", "oslo", "rome"} == set(summary.noise)
    privacy = shown(directory)
    noise = summary.noise[privacy["client"]]
    one = SampledGaussian(noise_multiplier=1.5, sampling_rate=noise.sampling_rate, steps=2 * noise.steps)
    assert privacy["epsilon"] == pytest.approx(compose([one], 1e-5).epsilon)
    assert privacy["unit"] == "photo"
    monkeypatch.setenv("COLUMNS", "60")
    told = output("show", str(directory.path))
    assert "privacy: ε = " in told
    assert max(map(len, told.splitlines()[told.splitlines().index("") :])) <= 60


@pytest.mark.usefixtures("stores")
@pytest.mark.parametrize("algorithm", ["fedasync", "fedbuff"])
def test_noise_in_asynchronous_rounds_is_reported_too(algorithm: str) -> None:
    directory = run("run", dp="sample", noise_multiplier=1.5, compare=False, algorithm=algorithm, rounds=4)
    releases = {each["client"]: each["releases"] for each in shown(directory)["releases"]}
    assert sum(releases.values()) >= 4
    assert set(releases) == set(run_summary(directory.path).noise)


@pytest.mark.usefixtures("stores")
def test_noise_does_not_follow_from_the_seed() -> None:
    one, other = run("one", dp="sample", noise_multiplier=1.0), run("other", dp="sample", noise_multiplier=1.0)
    assert not torch.allclose(final(one), final(other), atol=1e-3)


@pytest.mark.usefixtures("stores")
def test_noise_at_the_server_covers_every_model_and_is_reported() -> None:
    directory = run("run", dp="client", noise_multiplier=2.0, fraction=0.5, rounds=4)
    privacy = shown(directory)
    one = SampledGaussian(noise_multiplier=2.0, sampling_rate=0.5, steps=4)
    assert privacy["epsilon"] == pytest.approx(compose([one], 1e-5).epsilon)
    assert privacy["unit"] == "client"
    assert [(each["client"], each["releases"], each["steps"]) for each in privacy["releases"]] == [(None, 4, 4)]
    opened = FileCheckpoints(directory.checkpoints).load_open_round()
    assert opened is not None
    assert opened.noise_key is None
    card = json.loads((directory.model / CARD).read_text(encoding="utf-8"))  # published with the model
    assert {name: value for name, value in card["metrics"].items() if value} == {
        "central_accuracy": run_summary(directory.path).rounds[-1].central_accuracy
    }
    assert card["training"]["clients_counted_last_round"] is None
    again = run("again", dp="client", noise_multiplier=2.0, fraction=0.5, rounds=4)
    assert not torch.allclose(final(directory), final(again), atol=1e-4)


@pytest.mark.usefixtures("stores")
def test_an_adaptive_norm_is_kept_over_a_resumed_run() -> None:
    run("whole", dp="client", noise_multiplier=0.1, rounds=3)
    directory = run("whole", dp="client", noise_multiplier=0.1, rounds=3, extend=2)
    state = FileCheckpoints(directory.checkpoints).load()
    assert state is not None
    assert state.clip_norm is not None
    assert state.clip_norm != 0.1  # the first one
    assert [(each["client"], each["releases"]) for each in shown(directory)["releases"]] == [(None, 5)]


@pytest.mark.usefixtures("stores")
def test_a_run_without_noise_says_nothing_of_it() -> None:
    directory = run("run", rounds=1)
    assert shown(directory) is None
    assert "privacy:" not in output("show", str(directory.path))
