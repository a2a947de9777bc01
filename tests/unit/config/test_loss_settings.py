"""The loss, from files and flags to what a client trains with."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedshelf.app.components import training_of
from fedshelf.app.model import bound_model_of
from fedshelf.app.photos import StorePhotos
from fedshelf.app.setup import open_setup
from fedshelf.app.work import work_for
from fedshelf.config import files
from fedshelf.config.schema import RunConfig, select
from fedshelf.core.errors import UsageError
from fedshelf.core.messages import ClassFolder, Setup
from fedshelf.core.settings import Scope
from fedshelf.data.catalogue import Catalogue
from fedshelf.training.losses import FedLC, FedRS, Loss
from tests.worlds import photos

CATALOGUE = Catalogue.resolve({"a": [ClassFolder(leaf=name, path=name) for name in "vwxyz"]})


def config(**values: Any) -> RunConfig:
    return files.load(RunConfig, None, {"image_size": 16, "width": 4, **values})


def test_the_loss_is_plain_cross_entropy_unless_one_says_otherwise() -> None:
    assert training_of(config()).loss is None
    assert training_of(config(loss="fedrs")).loss == FedRS(0.5)
    assert training_of(config(loss="fedlc")).loss == FedLC(1.0)


def test_a_file_names_the_loss(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('loss = "fedlc"\nfedlc-tau = 0.25\n')
    found = files.load(RunConfig, tmp_path / "run.toml", {})
    assert training_of(found).loss == FedLC(0.25)


@pytest.mark.parametrize(
    ("name", "value"),
    [("loss", "focal"), ("fedrs_alpha", -0.1), ("fedrs_alpha", 1.1), ("fedlc_tau", -0.1)],
)
def test_a_value_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name.replace("_", "-")):
        config(**{name: value})


def test_the_loss_decides_the_result_and_clients_are_told() -> None:
    sent = select(config(loss="fedrs", fedrs_alpha=0.1), Scope.RUN)
    assert (sent["loss"], sent["fedrs-alpha"], sent["fedlc-tau"]) == ("fedrs", 0.1, 1.0)


def test_the_workbench_trains_with_the_configured_loss() -> None:
    settings = bound_model_of(config(loss="fedlc", fedlc_tau=0.3), CATALOGUE, device="cpu").settings
    assert settings.loss == FedLC(0.3)


def test_a_client_knows_all_classes_of_the_catalogue_and_counts_the_photos_it_trains_on() -> None:
    train = photos(1, 12, size=16)
    counts = [int((train.labels == label).sum()) for label in range(5)]
    losses: list[tuple[RunConfig, Loss]] = [
        (config(loss="fedrs", fedrs_alpha=0.2), FedRS(0.2)), (config(loss="fedlc", fedlc_tau=0.7), FedLC(0.7)),
    ]  # fmt: skip
    for given, expected in losses:
        digest = bound_model_of(given, CATALOGUE, device="cpu").params.layout.digest
        setup = Setup(run_id="r", config=files.for_clients(given), catalogue=CATALOGUE.to_json(), layout_digest=digest)
        opened = open_setup(setup, device="cpu")
        found = work_for("a", opened, StorePhotos(train=train, validation=photos(2, 30, size=16))).trainer.calibration
        assert found is not None
        right = expected.calibration(torch.tensor(counts))
        assert right is not None
        assert [part.tolist() for part in found] == [part.tolist() for part in right]
