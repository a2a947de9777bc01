"""The model that a client decoded last survives its process, or is not there at all."""

from pathlib import Path

import pytest
import torch

from fedshelf.storage.held_model import FileHeldModel


def test_what_was_kept_last_is_loaded_by_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    held, model = FileHeldModel(path), torch.randn(1000)
    assert held.load() is None
    held.save("first", torch.zeros(3))
    held.save("second", model)
    loaded = FileHeldModel(path).load()
    assert loaded is not None
    assert loaded[0] == "second"
    assert torch.equal(loaded[1], model)


def test_a_damaged_file_is_no_model_and_can_be_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "model.safetensors"
    FileHeldModel(path).save("a", torch.ones(1000))
    content = bytearray(path.read_bytes())
    for at in (-1, 10, 100):
        damaged = bytearray(content)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        assert FileHeldModel(path).load() is None
        assert "whole" in caplog.text
    path.write_bytes(content[:50])
    held = FileHeldModel(path)
    assert held.load() is None
    held.save("b", torch.ones(2))
    assert FileHeldModel(path).load() is not None
