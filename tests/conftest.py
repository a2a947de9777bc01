"""What all tests share: nothing of theirs lands in the user's own directories, and one thread computes."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Bitwise comparisons hold for one thread count, and models this small gain nothing from more.
torch.set_num_threads(1)
settings.register_profile("fedshelf", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fedshelf")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A FedShelf home of the test's own, and the working folder beside it."""
    folder = tmp_path / "home"
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setenv("FEDSHELF_HOME", str(folder))
    monkeypatch.chdir(work)
    return folder
