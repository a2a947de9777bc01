"""A user's own model in runs: as on the how-to page, and exactly as if it were built in."""

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedshelf.app.predictor import Predictor
from fedshelf.config import files
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import ModelError, RunError, UsageError
from fedshelf.core.events import RoundStarted, RunStatus
from fedshelf.models.own_model import find_source, use_model_path
from fedshelf.simulate.engine import simulate
from tests.howto import PAGES, run
from tests.own_models import RESNET10, forgotten_imports, write_resnet10
from tests.processes import same_model
from tests.unit.data.samples import write_pack


@pytest.fixture(autouse=True)
def _stores(home: Path) -> Iterator[None]:
    for name in ("lyon", "oslo"):
        write_pack(Path("stores") / name, {"apple": 4, "milk": 4})
    models = write_resnet10(Path("models").absolute())
    with forgotten_imports(models):
        yield


def config(run_dir: str, **values: Any) -> RunConfig:
    own = {"model": RESNET10, "model_path": Path("models").absolute()} if "model" not in values else {}
    return RunConfig(
        **{"data_dir": Path("stores").absolute(), "image_size": 16, "batch_size": 4, "device": "cpu", "rounds": 2,
           "val_fraction": 0, "threads": 1, "run_dir": Path(run_dir).absolute(), **own, **values}
    )  # fmt: skip


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"engine": "vmap"},
        {"personalize": "fedper", "codec_up": "int8"},
        pytest.param({"engine": "ray", "workers": 1}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_resnet10_as_an_own_model_trains_to_the_same_bits_as_the_built_in_one(flags: dict[str, Any]) -> None:
    simulate(config("own", **flags))
    simulate(config("built-in", model="resnet10", width=8, **flags))
    assert same_model(Path("own"), Path("built-in"))


def test_the_model_card_names_function_and_digest_and_predict_needs_that_source() -> None:
    _, directory = simulate(config("own"))
    use_model_path(Path("models").absolute())
    digest = find_source(RESNET10).digest
    card = json.loads((directory.model / "model_card.json").read_text())
    assert card["architecture"] == {"name": RESNET10, "norm": "batch", "width": 16, "source_digest": digest}
    assert f'model-digest = "{digest}"' in directory.config_toml
    assert "models" not in directory.config_toml.replace("--model", ""), "the path is this machine's own"
    photo = Path("stores/lyon/apple/000.png")
    guesses = Predictor.load(directory.model, model_path=Path("models")).predict(photo, top=2)
    assert {guess.label for guess in guesses} == {"apple", "milk"}
    (Path("models") / "ownnet" / "widths.py").write_text("WIDTH = 16\n")
    with pytest.raises(ModelError, match=f"and {digest[:16]}… is asked for"):
        Predictor.load(directory.model, model_path=Path("models"))


class StopInRound2:
    """Asks the run to stop when round 2 starts."""

    def __init__(self) -> None:
        self.stop = threading.Event()

    def emit(self, event: Any) -> None:
        if isinstance(event, RoundStarted) and event.round == 2:
            self.stop.set()


def test_a_run_resumes_with_the_same_source_and_with_no_other() -> None:
    whole, directory = simulate(config("whole", rounds=3))
    assert whole is RunStatus.FINISHED
    stopper = StopInRound2()
    simulate(config("run", rounds=3), watchers=(stopper,), stop=stopper.stop)
    helper = Path("models") / "ownnet" / "widths.py"
    before = helper.read_text()
    helper.write_text("WIDTH = 16\n")
    with pytest.raises(RunError, match=r"model-digest: .* \(the source of --model has changed: restore it\)"):
        simulate(config("run", rounds=3))
    helper.write_text(before)
    status, resumed = simulate(config("run", rounds=3))
    assert status is RunStatus.FINISHED
    assert same_model(resumed.path, directory.path)


def test_a_digest_in_the_configuration_pins_the_source() -> None:
    use_model_path(Path("models").absolute())
    digest = find_source(RESNET10).digest
    simulate(config("pinned", model_digest=digest, rounds=1))
    for pinned in ({"model_digest": "0" * 64}, {"model_digest": digest, "model": "resnet10"}):
        with pytest.raises(UsageError, match=r"model-digest = '.*': that of --model .* is "):
            simulate(config("other", **pinned))
        assert not Path("other").exists()


def test_clients_receive_name_and_digest_and_a_server_cannot_set_the_path() -> None:
    given = config("x", model_digest="0" * 64)
    assert {"model", "model-digest"} <= set(re.findall(r"^([a-z-]+) = ", files.for_clients(given), re.MULTILINE))
    assert "model-path" not in files.for_clients(given)


@pytest.mark.parametrize("how", [{}, {"pretrained": True}, {"model": "ownnet.small:mak"}])
def test_a_model_that_cannot_be_built_is_told_before_there_is_a_run(how: dict[str, Any]) -> None:
    (Path("models") / "ownnet" / "widths.py").write_text("WIDTH = 'wide'\n")
    model_path = Path("models").absolute()
    with pytest.raises(UsageError, match=r"calling it with 2 failed|--pretrained: |did you mean"):
        simulate(config("run", **{"model": RESNET10, "model_path": model_path, **how}))
    assert not Path("run").exists()


def test_the_model_of_the_page_is_trained_and_used_as_the_page_says() -> None:
    text = (PAGES / "use-your-own-model.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    path = re.search(r"^`(models/\w+\.py)`:", text, re.MULTILINE)
    assert path is not None
    Path(path[1]).write_text(source, encoding="utf-8")
    train, use = re.findall(r"^\$ fedshelf (.*)$", text, re.MULTILINE)[:2]
    run(train.replace("--rounds 3", "--rounds 1 --image-size 16 --min-clients 1 --device cpu --run-dir r").split())
    run(use.replace("shelf.jpg", "stores/lyon/apple/000.png").replace("runs/20261121-083512-a1b2", "r").split())
