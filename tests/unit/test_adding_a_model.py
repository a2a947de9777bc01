"""The model of the how-to page, added as the page says."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from fedshelf.app.predictor import Predictor
from fedshelf.config.schema import RunConfig
from fedshelf.core.choices import NormName
from fedshelf.core.events import RoundFinished, RunStatus
from fedshelf.core.params import bind
from fedshelf.models.build import build, find_problem
from fedshelf.models.head import head_names
from fedshelf.models.settings import ModelSettings
from fedshelf.simulate.engine import simulate
from tests.fakes import RecordingSink
from tests.howto import Addition
from tests.unit.data.samples import write_pack


@pytest.fixture(autouse=True)
def _added(monkeypatch: pytest.MonkeyPatch) -> None:
    Addition.of("add-a-model.md").install(monkeypatch)


@pytest.mark.parametrize("norm", get_args(NormName))
def test_the_model_of_the_page_has_one_layout_everywhere_and_the_norm_that_is_asked_for(norm: NormName) -> None:
    settings = ModelSettings(name="convmixer", num_classes=5, image_size=32, norm=norm)
    one, same, other = (build(settings, seed=seed) for seed in (1, 1, 2))
    assert bind(one).layout.digest == bind(other).layout.digest
    assert torch.equal(bind(one).vector, bind(same).vector)
    assert not torch.equal(bind(one).vector, bind(other).vector)
    assert one(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in one.modules())
    assert has_batch_norm == (norm == "batch")
    assert len(head_names(one)) == 2


def test_the_name_is_known_and_a_similar_one_is_told(home: Path) -> None:
    assert find_problem("convmixer") is None
    assert "did you mean 'convmixer'" in str(find_problem("convmixr"))
    assert "no pretrained weights" in str(find_problem("convmixer", pretrained=True))


def test_a_federation_trains_it_and_predict_loads_it(home: Path) -> None:
    for name in ("lyon", "oslo"):
        write_pack(Path("stores") / name, {"apple": 4, "milk": 4})
    config = RunConfig(
        data_dir=Path("stores"), model="convmixer", image_size=16, batch_size=4, device="cpu", val_fraction=0, rounds=4,
        personalize="fedper", codec_up="int8",
    )  # fmt: skip
    sink = RecordingSink()
    status, directory = simulate(config, watchers=(sink,))
    assert status is RunStatus.FINISHED
    losses = [record.train_loss for record in sink.of(RoundFinished)]
    assert losses[-1] is not None
    assert losses[0] is not None
    assert losses[-1] < losses[0]
    guesses = Predictor.load(directory.model).predict(Path("stores/lyon/apple/000.png"), top=2)
    assert {guess.label for guess in guesses} == {"apple", "milk"}
