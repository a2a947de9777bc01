"""A trained model is three files that belong together."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedshelf.core.errors import ModelError
from fedshelf.storage.model_files import load_model_files, save_model


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.rand(4, 3, 2, 2, generator=generator).to(memory_format=torch.channels_last),
        "bn.num_batches_tracked": torch.tensor(7),
        "head.weight": torch.rand(10, generator=generator)[2:8].view(2, 3),
        "half": torch.rand(3, generator=generator).to(torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "flag": torch.tensor([True, False]),
    }


def test_a_model_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    save_model(tmp_path / "model", tensors(), ["apple", "Käse"], {"model": "resnet10", "accuracy": float("nan")})
    loaded, labels, card = load_model_files(tmp_path / "model")
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert labels == ["apple", "Käse"]
    assert (card["model"], card["accuracy"]) == ("resnet10", None)


def test_other_programs_can_read_the_weights(tmp_path: Path) -> None:
    save_model(tmp_path, tensors(), [], {})
    read = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors().items())


def test_a_model_is_replaced_whole(tmp_path: Path) -> None:
    save_model(tmp_path, tensors(0), ["a"], {})
    save_model(tmp_path, tensors(1), ["b"], {})
    loaded, labels, _ = load_model_files(tmp_path)
    assert torch.equal(loaded["conv.weight"], tensors(1)["conv.weight"])
    assert labels == ["b"]


@pytest.mark.parametrize("name", ["model.safetensors", "labels.json"])
def test_files_of_two_models_are_not_taken_for_one(tmp_path: Path, name: str) -> None:
    save_model(tmp_path / "one", tensors(0), ["a"], {})
    save_model(tmp_path / "two", tensors(1), ["b"], {})
    (tmp_path / "two" / name).replace(tmp_path / "one" / name)
    with pytest.raises(ModelError, match=f"{name}.*of another model"):
        load_model_files(tmp_path / "one")


@pytest.mark.parametrize("name", ["model.safetensors", "labels.json", "model_card.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    save_model(tmp_path, tensors(), ["a"], {})
    (tmp_path / name).unlink()
    with pytest.raises(ModelError, match=f"{name} is missing"):
        load_model_files(tmp_path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", r"it is not JSON \(line 1, column 2\)"),
        ("{}", "it lacks 'sha256'"),
        ("[]", "a value in it has the wrong type"),
        ('{"sha256": 3}', "a value in it has the wrong type"),
    ],
)
def test_a_damaged_card_is_a_clear_error(tmp_path: Path, text: str, why: str) -> None:
    save_model(tmp_path, tensors(), ["a"], {})
    (tmp_path / "model_card.json").write_text(text)
    with pytest.raises(ModelError, match=rf"cannot be read: {why}\. Copy"):
        load_model_files(tmp_path)
