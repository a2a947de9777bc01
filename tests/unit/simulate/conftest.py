"""What tests with Ray share."""

import fcntl
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def with_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray, to start a cluster of the test's own; none is left afterwards. Ray finds clusters by looking through all
    processes, so one test at a time uses it, whichever worker runs it."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'fedshelf[ray]'")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # Actors import the tests' models from here.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT)]))
    with (Path(tempfile.gettempdir()) / f"fedshelf-tests-with-ray-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        import ray

        assert not ray.is_initialized()
        left = [child for child in psutil.Process().children(recursive=True) if "ray" in " ".join(child.cmdline())]
        assert psutil.wait_procs(left, timeout=10)[1] == []
