"""The algorithm of the how-to page, added to a copy of the project as the page says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.howto import Addition
from tests.unit.data.samples import write_pack

ROOT = Path(__file__).parents[2]
PROGRAM = '''
import json, sys
from fedshelf.cli import main

def fedshelf(*arguments):
    """The exit code of a command."""
    try:
        main(list(arguments))
    except SystemExit as ended:
        return ended.code or 0
    return 0

run = [
    "simulate", "--data-dir", "stores", "--algorithm", "bounded", "--rounds", "1", "--image-size", "16", "--width", "8",
    "--batch-size", "4", "--device", "cpu", "--local-epochs", "1", "--warmup-rounds", "0", "--run-dir", "run", "--json",
]
wrong = fedshelf(*run, "--longest-step", "0")
torch_at_start = "torch" in sys.modules
right = fedshelf(*run, "--longest-step", "0.001")

import tomllib
from pathlib import Path
from fedshelf.app.components import bound_model_of
from fedshelf.config import files
from fedshelf.config.schema import RunConfig
from fedshelf.data.catalogue import Catalogue
from fedshelf.storage.checkpoints import FileCheckpoints

config = files.parse(RunConfig, tomllib.loads(Path("run/config.toml").read_text()), where="the run")
first = bound_model_of(config, Catalogue.load(Path("run/catalogue.json")), device="cpu").params.shared
loaded = FileCheckpoints(Path("run/checkpoints")).load()
print(json.dumps([wrong, torch_at_start, right, (loaded.model.params - first).norm().item()]))
'''


def test_the_algorithm_of_the_page_works_with_its_setting_and_does_what_it_says(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    Addition.of("add-an-algorithm.md").add_to(tmp_path)
    for name in ("lyon", "oslo"):
        write_pack(tmp_path / "stores" / name, {"apple": 4, "milk": 4})
    environment = {
        **os.environ, "PYTHONPATH": str(tmp_path / "src"), "FEDSHELF_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "longest-step" in ended.stderr, "0 is out of bounds, and the flag is named"
    wrong, torch_at_start, right, length = json.loads(ended.stdout.splitlines()[-1])
    assert (wrong, torch_at_start, right) == (2, False, 0)
    assert 0.0009 < length <= 0.00101
