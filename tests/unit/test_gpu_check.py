"""scripts/gpu-check runs on a bare machine with torch and numpy, and finds mistakes."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu-check"
CHECKS = {
    "float32", "amp", "compile", "prefetch", "vmap-float32", "vmap", "features", "head",
    "fine-tuning-float32", "fine-tuning", "evaluation",
}  # fmt: skip
# torch, its own requirements, numpy, and Pillow. All other packages are as if they were not installed.
ALLOWED = {
    "torch", "torchgen", "functorch", "numpy", "PIL", "fedshelf", "filelock", "fsspec", "jinja2", "markupsafe",
    "mpmath", "networkx", "sympy", "typing_extensions", "setuptools", "pkg_resources", "_distutils_hack", "triton",
}  # fmt: skip
BARE = '''
import runpy, sys
from importlib.metadata import packages_distributions

class Without:
    """A finder of modules that does not find those that are missing."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in missing else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

script, missing = sys.argv[1], packages_distributions().keys() - set(sys.argv[2].split())
assert {"blake3", "psutil", "pydantic", "cv2"} <= missing
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
sys.argv[:] = [script, *sys.argv[3:]]
runpy.run_path(script, run_name="__main__")
'''


def test_it_runs_with_torch_and_numpy_alone_and_prints_one_line_of_json() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(SCRIPT), " ".join(ALLOWED), "--device", "cpu", "--quick"],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    report = json.loads(line)
    assert report["ok"]
    assert report["torch"] == torch.__version__
    assert report["checks"].keys() == CHECKS
    for result in report["checks"].values():
        assert 0 <= result["error"] <= result["tolerance"] < 0.5
        assert result["ratio"] == result["seconds"] / result["plain_seconds"]


@pytest.fixture
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_loader("gpu_check", SourceFileLoader("gpu_check", str(SCRIPT)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = [*sys.path]
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_check"]
    sys.path[:] = before


def test_training_with_one_term_wrong_fails_the_checks(script: ModuleType) -> None:
    checks = script.Checks("cpu", script.QUICK)
    right = checks.settings
    assert checks.check_float32().ok
    assert checks.check_fine_tuning_float32().ok
    checks.settings = replace(right, label_smoothing=0.0)
    assert not checks.check_float32().ok
    for wrong in (replace(right, weight_decay=0.0), replace(right, momentum=0.8), replace(right, gradient_clip=0.0)):
        checks.settings = wrong
        assert not checks.check_float32().ok, wrong
        assert not checks.check_fine_tuning_float32().ok, wrong


@pytest.mark.skipif(torch.cuda.is_available(), reason="it has a GPU to run on")
def test_without_a_gpu_it_says_so(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    assert script.main() == 77
    said = capsys.readouterr()
    assert said.out == ""
    assert "torch finds no CUDA device here; --device cpu runs the checks on the CPU" in said.err
