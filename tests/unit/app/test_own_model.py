"""Which model `predict` and `evaluate` take where none is named."""

import json
from pathlib import Path

import pytest

from fedshelf.app.client_place import ClientPlace
from fedshelf.app.predictor import model_folder
from fedshelf.core.errors import UsageError


def client(name: str, *, keeps_model: bool = True) -> ClientPlace:
    """A client that has taken part: its photos are in a folder of its name."""
    Path(name).mkdir()
    place = ClientPlace.of(Path(name), name=None, state_dir=None, device="cpu")
    place.make_state_dir()
    if keeps_model:
        (place.state_dir / "model").mkdir()
        (place.state_dir / "model" / "model_card.json").write_text(json.dumps({}))
    return place


def test_the_only_client_s_model_is_taken(home: Path) -> None:
    client("oslo", keeps_model=False)
    lyon = client("lyon")
    assert model_folder(None, best=False) == lyon.state_dir / "model"


def test_of_several_clients_the_one_counts_whose_photos_or_state_are_here(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lyon, oslo = client("lyon"), client("oslo")
    with pytest.raises(UsageError, match=f"several clients .* {lyon.state_dir}/model, {oslo.state_dir}/model"):
        model_folder(None, best=False)
    monkeypatch.chdir("oslo")
    assert model_folder(None, best=False) == oslo.state_dir / "model"
    for folder in (lyon.state_dir, lyon.state_dir / "model"):
        monkeypatch.chdir(folder)
        assert model_folder(None, best=False) == lyon.state_dir / "model"
    assert model_folder(str(oslo.state_dir), best=False) == oslo.state_dir / "model", "a state directory will do"


def test_where_no_client_keeps_a_model_that_is_said(home: Path) -> None:
    client("lyon", keeps_model=False)
    with pytest.raises(UsageError, match="no client on this machine keeps a model yet: name a run"):
        model_folder(None, best=False)
