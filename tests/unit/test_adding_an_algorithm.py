"""The algorithm of the how-to page, added to a copy of the project as the page says."""

from pathlib import Path

from tests.howto import run_with
from tests.unit.data.samples import write_pack

PROGRAM = """
run = ["--algorithm", "bounded", "--run-dir", "run"]
wrong = simulate(*run, "--longest-step", "0")
torch_at_start = "torch" in sys.modules
right = simulate(*run, "--longest-step", "0.001")

import tomllib
from pathlib import Path
from fedshelf.app.model import bound_model_of
from fedshelf.config import files
from fedshelf.config.schema import RunConfig
from fedshelf.data.catalogue import Catalogue
from fedshelf.storage.checkpoints import FileCheckpoints

config = files.parse(RunConfig, tomllib.loads(Path("run/config.toml").read_text()), where="the run")
first = bound_model_of(config, Catalogue.load(Path("run/catalogue.json")), device="cpu").params.shared
loaded = FileCheckpoints(Path("run/checkpoints")).load()
print(json.dumps([wrong, torch_at_start, right, (loaded.model.params - first).norm().item()]))
"""


def test_the_algorithm_of_the_page_works_with_its_setting_and_does_what_it_says(tmp_path: Path) -> None:
    for name in ("lyon", "oslo"):
        write_pack(tmp_path / "stores" / name, {"apple": 4, "milk": 4})
    ended = run_with("add-an-algorithm.md", PROGRAM, tmp_path)
    assert "longest-step" in ended.stderr, "0 is out of bounds, and the flag is named"
    wrong, torch_at_start, right, length = ended.result
    assert (wrong, torch_at_start, right) == (2, False, 0)
    assert 0.0009 < length <= 0.00101
