"""Runs that train adapters: they publish a plain model, and resume to the last bit."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedshelf.app.predictor import Predictor
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import UsageError
from fedshelf.core.events import RoundStarted, RunStatus
from fedshelf.simulate.engine import simulate
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.tracking.queries import run_summary
from tests.own_models import VIT, forgotten_imports, write_vit
from tests.processes import same_model
from tests.unit.data.samples import write_pack


@pytest.fixture(autouse=True)
def _stores(home: Path) -> Iterator[None]:
    for folder in ("stores/lyon", "stores/oslo", "test"):
        write_pack(Path(folder), {"apple": 4, "milk": 4})
    models = write_vit(Path("models").absolute())
    with forgotten_imports(models):
        yield


def config(run_dir: str, **values: Any) -> RunConfig:
    given = {
        "data_dir": Path("stores").absolute(), "image_size": 16, "batch_size": 4, "device": "cpu", "rounds": 3,
        "val_fraction": 0, "threads": 1, "run_dir": Path(run_dir).absolute(), "train": "adapter", "client_lr": 0.1,
        "model": VIT, "model_path": Path("models").absolute(), "test_dir": Path("test").absolute(),
    }  # fmt: skip
    return RunConfig(**{**given, **values})


def started_from(folder: str) -> Path:
    """A model published by a run in which everything was trained."""
    _, directory = simulate(config(folder, train="all", rounds=1))
    return directory.model / "model.safetensors"


def tensors(directory: RunDirectory) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(directory.model / "model.safetensors")
    return found


def test_the_published_model_is_a_plain_one_and_gives_the_accuracy_of_the_run() -> None:
    start = started_from("start")
    _, directory = simulate(config("run", init=start, adapter_rank=2, adapter_alpha=6.0))
    published, before = tensors(directory), load_file(start)
    assert published.keys() == before.keys()
    moved = {name for name, tensor in published.items() if not torch.equal(tensor, before[name])}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert moved == {"head.weight", "head.bias", *(f"blocks.0.{layer}.weight" for layer in layers)}
    for layer in layers:
        change = published[f"blocks.0.{layer}.weight"] - before[f"blocks.0.{layer}.weight"]
        assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2
    card = json.loads((directory.model / "model_card.json").read_text())
    assert card["training"]["train"] == "adapter"
    assert card["training"]["adapter"] == {"rank": 2, "alpha": 6.0, "merged": True}
    report = Predictor.load(directory.model, model_path=Path("models")).evaluate(Path("test"))
    assert report.accuracy == card["metrics"]["central_accuracy"]


def test_a_round_moves_adapters_and_the_output_layer_alone() -> None:
    def bytes_of(name: str, **values: Any) -> int:
        _, directory = simulate(config(name, rounds=2, **values))
        return run_summary(directory.path).rounds[-1].bytes_up

    num_values = 2 * (96 + 32 + 128 + 32) + 2 * 32 + 2  # B of four layers, and the head
    found = bytes_of("adapter", adapter_rank=2)
    assert 0 < found - 2 * 4 * num_values < 8000, "two stores' headers"
    assert bytes_of("all", train="all") > 8 * found


class StopInRound2:
    """Asks the run to stop when round 2 starts."""

    def __init__(self) -> None:
        self.stop = threading.Event()

    def emit(self, event: Any) -> None:
        if isinstance(event, RoundStarted) and event.round == 2:
            self.stop.set()


@pytest.mark.parametrize("from_file", [False, True])
def test_a_stopped_run_resumes_to_the_same_bits_though_its_weights_file_is_gone(from_file: bool) -> None:
    start = started_from("start") if from_file else None
    _, whole = simulate(config("whole", init=start))
    stopper = StopInRound2()
    stopped, _ = simulate(config("run", init=start), watchers=(stopper,), stop=stopper.stop)
    assert stopped is not RunStatus.FINISHED
    if start is not None:
        start.unlink()
    status, resumed = simulate(config("run", init=start))
    assert status is RunStatus.FINISHED
    assert same_model(resumed.path, whole.path)


def test_a_published_model_is_the_start_of_the_next_run() -> None:
    _, first = simulate(config("first"))
    _, second = simulate(config("second", init=first.model / "model.safetensors", rounds=1, seed=5))
    started = load_file(second.initial_model / "model.safetensors")
    assert all(torch.equal(tensor, started[name]) for name, tensor in tensors(first).items())


def test_engines_and_workers_train_the_same_adapters() -> None:
    _, alone = simulate(config("alone"))
    _, workers = simulate(config("workers", workers=2))
    _, together = simulate(config("together", engine="vmap"))
    assert same_model(alone.path, workers.path)
    for name, tensor in tensors(together).items():
        torch.testing.assert_close(tensor, tensors(alone)[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("flags", [{"personalize": "fedper"}, {"warm_start": "ridge", "refit_head": True}], ids=str)
def test_the_output_layer_may_stay_at_the_stores_or_be_computed_in_closed_form(flags: dict[str, Any]) -> None:
    start = started_from("start")
    status, directory = simulate(config("run", init=start, **flags))
    assert status is RunStatus.FINISHED
    before, after = load_file(start), tensors(directory)
    assert not torch.equal(after["blocks.0.mlp.fc1.weight"], before["blocks.0.mlp.fc1.weight"])
    assert torch.equal(after["blocks.0.mlp.fc1.bias"], before["blocks.0.mlp.fc1.bias"])
    assert torch.equal(after["head.weight"], before["head.weight"]) == ("personalize" in flags)


@pytest.mark.parametrize(
    ("train", "said"), [("adapter", "no linear layers besides its output layer"), ("head", "no output layer")]
)
def test_a_model_that_lacks_the_layers_to_train_is_told_before_there_is_a_run(train: str, said: str) -> None:
    (Path("models") / "ownvit.py").write_text(
        "from torch import nn\n\n\ndef make(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, num_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    with pytest.raises(UsageError, match=f"--train {train}: this model has {said}"):
        simulate(config("run", train=train))
    assert not Path("run").exists()
