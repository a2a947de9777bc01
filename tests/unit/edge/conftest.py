"""One exported model for all tests that only read it: torch's exporter takes seconds."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.model_folders import write_model
from tests.unit.cli.screen import run


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """A model that tells three colors apart, and its file.

    Attributes:
        folder: the model's folder.
        file: the model file.
        text: what the command said.
    """

    folder: Path
    file: Path
    text: str


@pytest.fixture(scope="session")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The paths of products are of two levels."""
    place = tmp_path_factory.mktemp("exported")
    write_model(place / "model", paths=["Warm/Red", "Cold/Green", "Cold/Blue"], image_size=32)
    code, text = run("export", str(place / "model"), "--format", "onnx", "--out", str(place / "m.onnx"))
    assert code == 0, text
    return Exported(folder=place / "model", file=place / "m.onnx", text=text)
