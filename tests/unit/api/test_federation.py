"""`fedshelf.Federation`: the results of the command line, from any kind of stores and models."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fedshelf
from fedshelf import algorithms
from fedshelf.app.predictor import Predictor
from fedshelf.core.events import RunStatus
from fedshelf.models.resnet import resnet10
from fedshelf.tracking.queries import run_summary
from tests.howto import run as run_command
from tests.unit.api.samples import SMALL, Photos, as_floats, datasets, same_weights

LAZY = """
import sys, fedshelf
heavy = {"torch", "flwr", "pydantic", "numpy", "timm", "rich", "fedshelf.api.federation"}
print(sorted(heavy & sys.modules.keys()), sorted(set(dir(fedshelf)) - set(fedshelf.__all__)))
"""


def train(stores: Any = "stores", *, rounds: int = 2, **values: Any) -> fedshelf.Result:
    return fedshelf.Federation(stores, **{"test": "test", **SMALL, **values}).run(rounds, progress=False)


def test_importing_fedshelf_loads_nothing_heavy_and_lists_its_public_names() -> None:
    shown = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=True).stdout
    assert shown == "[] ['__version__']\n"
    assert all(getattr(fedshelf, name) is not None for name in fedshelf.__all__)
    with pytest.raises(AttributeError, match="module 'fedshelf' has no attribute 'Federaton'"):
        fedshelf.Federaton  # type: ignore[attr-defined]  # noqa: B018


def test_a_federation_of_folders_ends_with_the_bits_and_the_record_of_the_command_line() -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    run_command(
        ["simulate", "--data-dir=stores", "--test-dir=test", "--rounds=2", "--run-dir=cli", "--algorithm=fedprox",
         "--mu=0.5", "--json", *flags]
    )  # fmt: skip
    result = train(algorithm=algorithms.FedProx(mu=0.5), run_dir="api")
    assert Path("api/config.toml").read_text() == Path("cli/config.toml").read_text()
    weights = load_file("cli/model/model.safetensors")
    assert result.model is not None
    assert all(torch.equal(value, weights[name]) for name, value in result.model.state_dict().items())
    summary = run_summary(Path("cli"))
    assert [(r.accuracy, r.central_accuracy, r.train_loss) for r in result.history] == [
        (r.accuracy, r.central_accuracy, r.train_loss) for r in summary.rounds
    ]


@pytest.mark.parametrize("convert", [lambda image: image, np.asarray, as_floats], ids=["Pillow", "uint8", "float"])
def test_datasets_of_the_same_photos_give_the_same_bits_as_folders(convert: Any) -> None:
    folders = train(val_fraction=0)
    given = datasets(convert)
    in_memory = train(given, test=Photos(Path("test"), convert), val_fraction=0)
    assert same_weights(folders.model, in_memory.model)
    assert [r.central_accuracy for r in folders.history] == [r.central_accuracy for r in in_memory.history]
    assert in_memory.products == folders.products
    assert in_memory.products.products_on == "test photos"
    mixed = train({"lyon": "stores/lyon", "oslo": given["oslo"]}, val_fraction=0)
    assert same_weights(folders.model, mixed.model)
    listed = train([Path("stores/lyon"), "stores/oslo"], test=Photos(Path("test")), val_fraction=0)
    assert same_weights(folders.model, listed.model)


def test_workers_train_datasets_and_given_models_to_the_same_bits() -> None:
    alone, together = (train(datasets(), model=partial(resnet10, width=8), workers=workers) for workers in (0, 2))
    assert same_weights(alone.model, together.model)


def test_datasets_hold_out_val_fraction_for_validation() -> None:
    result = train(datasets(), val_fraction=0.25)
    assert [store.accuracy is not None for store in result.stores.values()] == [True, True]
    assert [store.num_examples for store in result.stores.values()] == [6, 7]
    assert train(datasets(), val_fraction=0).stores["lyon"].num_examples == 8


def test_a_model_as_a_function_or_a_module_equals_the_built_in_one() -> None:
    built_in = train()
    assert same_weights(built_in.model, train(model=partial(resnet10, width=8)).model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module = resnet10(2, width=8)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    other = train(model=module)
    assert not same_weights(built_in.model, other.model)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items()), "it is copied"
    assert other.model is not module


def test_a_given_model_is_not_found_by_its_name_later() -> None:
    train(model=partial(resnet10, width=8), run_dir="run")
    assert json.loads(Path("run/model/model_card.json").read_text())["architecture"]["name"] == "__main__:model"
    with pytest.raises(fedshelf.FedShelfError, match=r"was given to .* as an object"):
        Predictor.load(Path("run/model"))


def wrong_shape(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 7))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"client_lrr": 0.1}, "unknown keyword argument 'client_lrr': did you mean 'client_lr'?"),
        ({"address": "0.0.0.0:1"}, "unknown keyword argument 'address'"),
        ({"client_lr": -1, "rounds": 0}, "--client-lr -1: must be more than 0; --rounds 0: must be at least 1"),
        ({"data_dir": "stores"}, "data_dir: give it as stores"),
        ({"algorithm": "fedprx"}, "did you mean 'fedprox'?"),
        ({"algorithm": algorithms.FedProx(), "mu": 1}, "'mu': give it to FedProx, not as a keyword argument, too"),
        ({"algorithm": object()}, "is not a registered one"),
        ({"model": 3}, "model is a int: give a name"),
        ({"algorithm": "ridge", "train": "head", "local_training": print}, "stores send sums instead of training"),
        ({"engine": "vmap", "local_training": print}, "such a function trains one client at a time"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_one_sentence_before_anything_starts(values: dict[str, Any], said: str) -> None:
    with pytest.raises(fedshelf.FedShelfError) as caught:
        fedshelf.Federation("stores", **{**SMALL, **values})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("stores", "values", "said"),
    [
        ("absent", {}, "--data-dir .*absent: no such folder"),
        ({"lyon": "stores/lyon", "rome": "absent"}, {}, "the store 'rome', .*absent: no such folder"),
        ({"lyon": 3}, {}, "the store 'lyon' is a int: give a folder or a Dataset"),
        (["stores/lyon", "./stores/lyon"], {}, "several stores are called lyon"),
        (7, {}, "stores is a int"),
        ("stores", {"test": 7}, "test is a int"),
        ("stores", {"model": wrong_shape}, r"wrong_shape returns \[2, 7\] for 2 photos"),
    ],
)
def test_wrong_stores_and_models_are_one_sentence_and_leave_nothing(
    stores: Any, values: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with pytest.raises(fedshelf.FedShelfError, match=said):
        train(stores, **values)
    assert list(temporary.glob("fedshelf-run-*")) == []


class Listed(list[Any]):
    """Photos and labels with class names: a sequence, which is a Dataset, too."""

    classes = ("apple", "soap")


def test_test_photos_in_memory_of_products_that_no_store_has_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    photos = [Photos(Path("test"))[index] for index in range(6)]
    result = train(test=Listed(photos), best_metric="central_accuracy", rounds=1)
    assert "the test photos: left out: 3 photos of classes that are not in the catalogue: soap (3)" in caplog.text
    apples = train(test=Listed(photos[:3]), rounds=1)
    assert result.history[0].central_accuracy == apples.history[0].central_accuracy
    with pytest.raises(fedshelf.FedShelfError, match="none of the test photos is of a class that the clients hold"):
        train(test=Listed(photos[3:]))
    with pytest.raises(fedshelf.FedShelfError, match="central_accuracy needs test photos"):
        fedshelf.Federation("stores", best_metric="central_accuracy", **SMALL)


def test_stores_keep_models_of_their_own_and_the_result_has_them() -> None:
    result = train(datasets(), personalize="finetune", finetune_epochs=1)
    for name, store in result.stores.items():
        assert store.kept in store.accuracies
        assert result.store_model(name).state_dict().keys() == result.best_model().state_dict().keys()
    with pytest.raises(fedshelf.FedShelfError, match="the store 'rome' keeps no model of its own"):
        result.store_model("rome")


def test_stores_in_memory_are_not_asked_for_figures_that_have_no_noise(capsys: pytest.CaptureFixture[str]) -> None:
    stores = datasets()
    settings = {
        "val_fraction": 0.4,
        "dp": "sample",
        "noise_multiplier": 2.0,
        "norm": "group",
        "personalize": "finetune",
    }
    result = fedshelf.Federation(stores, **{"test": "test", **SMALL, **settings}).run(1)
    assert [member.status.value for member in result.history[0].clients] == ["counted"] * 2
    said = capsys.readouterr()
    assert "lyon has compared models; it does not tell which of its models it keeps" in said.out + said.err
    assert "warning" not in said.out + said.err
    assert "validation photo" not in said.out + said.err


@pytest.mark.parametrize("kind", ["sample", "client"])
def test_noise_is_a_setting_like_others_and_the_result_tells_its_guarantee(kind: str) -> None:
    result = train(datasets(), dp=kind, target_epsilon=30.0, delta=1e-4, norm="group", compare=False)
    report = result.privacy()
    assert report is not None
    assert 25 < report.guarantee.epsilon <= 30.0
    assert (report.guarantee.delta, report.guarantee.unit) == (1e-4, "photo" if kind == "sample" else "client")
    assert report.num_releases == ({"lyon": 2, "oslo": 2} if kind == "sample" else {"": 2})
    assert train(datasets()).privacy() is None


def test_rows_are_plain_and_transform_prepares_a_photo_for_the_model() -> None:
    result = train()
    assert json.loads(json.dumps(result.rows()))[1]["num_counted"] == 2
    assert [row["name"] for row in result.rows("stores")] == ["lyon", "oslo"]
    counts = {row["product"]: row["total"] for row in result.rows("products")}
    assert counts.keys() <= set(result.classes)
    assert sum(counts.values()) == 2, "the validation photos of two stores"
    assert repr(result).startswith("Result(finished, rounds=2, stores=2, accuracy=")
    assert result.model is not None
    photos = Photos(Path("test"))
    items = [photos[index] for index in range(6)]
    with torch.inference_mode():
        logits = result.model(torch.stack([result.transform(photo) for photo, _ in items]))
    guesses = [result.classes[int(output)] for output in logits.argmax(1)]
    hits = sum(guess == photos.classes[label] for guess, (_, label) in zip(guesses, items, strict=True))
    assert hits / 6 == result.history[-1].central_accuracy


def test_a_data_frame_has_a_row_per_round() -> None:
    polars = pytest.importorskip("polars")
    frame = train().to_frame()
    assert isinstance(frame, polars.DataFrame)
    assert frame["round"].to_list() == [1, 2]
    assert train().to_frame("stores")["name"].to_list() == ["lyon", "oslo"]


def test_without_polars_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(fedshelf.FedShelfError, match=r"pip install 'fedshelf\[frames\]'"):
        train(rounds=1).to_frame()


def test_a_temporary_run_is_deleted_with_its_result_and_torch_has_its_threads_again() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        result = train(threads=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    folder = result.run_dir.parent
    assert folder.is_dir()
    del result
    gc.collect()
    assert not folder.exists()


def interrupted_in(round: int) -> Any:
    """Local training that presses Ctrl-C in a round."""

    def train(module: nn.Module, batches: Any, client_lr: float, hooks: fedshelf.Hooks) -> float:
        if hooks.round == round:
            os.kill(os.getpid(), signal.SIGINT)
        for photos, labels in batches:
            module.zero_grad()
            hooks.loss(module(photos), labels).backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(parameter.grad, alpha=client_lr)
        return 1.0

    return train


def test_ctrl_c_returns_the_last_finished_round_and_a_run_with_a_folder_resumes(
    capfd: pytest.CaptureFixture[str],
) -> None:
    given: dict[str, Any] = {"lr_schedule": "constant", "warmup_rounds": 0}  # a round does not depend on their number
    stopped = train(rounds=3, local_training=interrupted_in(3), run_dir="run", **given)
    assert "press Ctrl-C again to exit at once" in capfd.readouterr().err
    assert stopped.status is RunStatus.STOPPED
    assert [round_.round for round_ in stopped.history] == [1, 2]
    assert same_weights(stopped.model, train(rounds=2, local_training=interrupted_in(0), **given).model)
    resumed = train(rounds=3, local_training=interrupted_in(0), run_dir="run", **given)
    assert [round_.round for round_ in resumed.history] == [1, 2, 3]
    assert same_weights(resumed.model, train(rounds=3, local_training=interrupted_in(0), **given).model)


def test_ctrl_c_in_the_first_round_returns_no_model() -> None:
    stopped = train(rounds=3, local_training=interrupted_in(1))
    assert (stopped.status, stopped.history, stopped.model) == (RunStatus.STOPPED, (), None)
    with pytest.raises(fedshelf.FedShelfError, match="no round has finished"):
        stopped.transform(Photos(Path("test"))[0][0])


def test_it_runs_in_a_thread_which_gets_no_signals() -> None:
    results: list[fedshelf.Result] = []
    thread = threading.Thread(target=lambda: results.append(train(rounds=1)))
    thread.start()
    thread.join()
    assert results[0].status is RunStatus.FINISHED


def test_progress_is_a_line_per_round_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    fedshelf.Federation("stores", **SMALL).run(2)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("round ")] == [
        "1/2", "2/2",
    ]  # fmt: skip
