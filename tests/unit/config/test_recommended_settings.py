"""Settings whose default depends on others: those that suit an algorithm, and those of fine-tuning."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedshelf.config import files
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import UsageError

FINE_TUNING: dict[str, Any] = {
    "freeze_norm": True, "client_lr": 0.01, "warmup_rounds": 0, "warm_start": "ridge", "refit_head": True,
    "head_lr_factor": 0.0,
}  # fmt: skip


def differing(**given: Any) -> dict[str, Any]:
    """Settings with another value than without pretrained weights, other than those given."""
    config, usual = files.load(RunConfig, None, {"pretrained": True, **given}), files.load(RunConfig, None, given)
    return {
        name: value for name, value in config.model_dump().items()
        if value != getattr(usual, name) and name != "pretrained"
    }  # fmt: skip


def test_pretrained_weights_are_fine_tuned_by_the_recipe_that_was_measured() -> None:
    assert differing() == FINE_TUNING
    assert differing(algorithm="fedprox", personalize="finetune") == FINE_TUNING


def test_what_is_given_stays() -> None:
    given = {"client_lr": 0.05, "refit_head": False, "head_lr_factor": 1.0}
    assert differing(**given) == {name: FINE_TUNING[name] for name in FINE_TUNING if name not in given}


@pytest.mark.parametrize("given", [
    {"warm_start": "none"}, {"algorithm": "fedbuff"}, {"aggregator": "median"}, {"personalize": "fedper"},
    {"clip_norm": 1.0}, {"val_fraction": 0.0},
])  # fmt: skip
def test_where_a_head_in_closed_form_does_not_fit_only_the_rest_is_fine_tuned(given: dict[str, Any]) -> None:
    assert differing(**given) == {name: FINE_TUNING[name] for name in ("freeze_norm", "client_lr", "warmup_rounds")}


def test_statistics_that_start_fresh_at_the_stores_are_not_frozen() -> None:
    assert differing(personalize="fedbn") == {name: FINE_TUNING[name] for name in ("client_lr", "warmup_rounds")}


@pytest.mark.parametrize("given", [{"train": "head"}, {"train": "adapter"}, {"algorithm": "ridge"}])
def test_what_trains_a_part_has_settings_of_its_own(given: dict[str, Any]) -> None:
    assert differing(**given) == {}


def implied_by_sales(**given: Any) -> dict[str, Any]:
    """The settings that sales imply."""
    config, usual = files.load(RunConfig, None, {"sales": True, **given}), files.load(RunConfig, None, given)
    return {
        name: value for name, value in config.model_dump().items()
        if value != getattr(usual, name) and name != "sales"
    }  # fmt: skip


def test_sales_imply_a_frozen_image_part_a_gate_at_each_store_and_labels_as_they_are() -> None:
    expected = {"train": "head", "personalize": "gate", "label_smoothing": 0.0}
    assert implied_by_sales() == expected
    assert implied_by_sales(train="sales", personalize="none") == {"label_smoothing": 0.0}


def test_with_pretrained_weights_sales_begin_under_a_head_in_closed_form_that_moves_slowly() -> None:
    found = files.load(RunConfig, None, {"sales": True, "pretrained": True})
    assert (found.train, found.warm_start, found.head_lr_factor, found.refit_head) == ("head", "ridge", 0.1, False)
    assert (found.client_lr, found.freeze_norm) == (0.05, False)
    without = files.load(RunConfig, None, {"sales": True, "pretrained": True, "val_fraction": 0.0})
    assert (without.warm_start, without.head_lr_factor) == ("none", 1.0)


def test_a_flag_takes_back_what_a_file_implies(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("pretrained = true\n")
    assert files.load(RunConfig, path, {"pretrained": False}) == files.load(RunConfig, None, {"pretrained": False})
    path.write_text('pretrained = true\nalgorithm = "ridge"\n')
    assert files.load(RunConfig, path, {"algorithm": "fedavg"}).head_lr_factor == 0


@pytest.mark.parametrize("given", [{}, {"freeze_norm": False, "head_lr_factor": 1.0, "warm_start": "none"}])
def test_a_runs_text_used_as_a_file_gives_the_same_run(tmp_path: Path, given: dict[str, Any]) -> None:
    config = files.load(RunConfig, None, {"pretrained": True, **given})
    text = files.effective(config)
    path = tmp_path / "again.toml"
    path.write_text(text)
    assert files.effective(files.load(RunConfig, path, {})) == text


def test_clients_get_the_settings_and_not_the_reason() -> None:
    config = files.load(RunConfig, None, {"pretrained": True, "head_lr_factor": 1.0})
    text = files.for_clients(config)
    assert "pretrained" not in tomllib.loads(text)
    received = files.from_a_server(text)
    assert (received.freeze_norm, received.client_lr, received.head_lr_factor) == (True, 0.01, 1.0)


def test_with_sales_a_head_may_stay_as_it_is() -> None:
    assert files.load(RunConfig, None, {"sales": True, "pretrained": True, "head_lr_factor": 0.0}).train == "head"
    with pytest.raises(UsageError, match="nothing would be trained"):
        files.load(RunConfig, None, {"train": "head", "head_lr_factor": 0.0})
