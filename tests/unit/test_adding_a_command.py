"""The command of the how-to page, added to a copy of the project as the page says."""

import re
from pathlib import Path

import torch

from fedshelf.storage.model_files import save_model
from tests.howto import run_with

PROGRAM = """
import contextlib, io

shown = {}
for name, arguments in {
    "help": ["--help"], "own": ["products", "--help"], "list": ["products", "--run", "model"],
    "json": ["products", "--run", "model", "--json"], "missing": ["products", "--run", "other"], "near": ["product"],
}.items():
    before = "torch" in sys.modules
    with contextlib.redirect_stdout(io.StringIO()) as out:
        shown[name] = [fedshelf(*arguments), out.getvalue(), before]
print(json.dumps(shown))
"""


def test_the_command_of_the_page_works_like_the_built_in_ones(tmp_path: Path) -> None:
    save_model(tmp_path / "model", {"weight": torch.zeros(2)}, ["apple", "[b]milk\x1b[2J"], {})
    ended = run_with("add-a-command.md", PROGRAM, tmp_path)
    code, text, _ = ended.result["help"]
    assert code == 0
    assert re.search(r"^  products +List the products that a model knows$", text, re.MULTILINE)
    code, text, _ = ended.result["own"]
    assert "Example: fedshelf products --run" in text
    assert ended.result["list"] == [0, "apple\n[b]milk\\x1b[2J\n", False]
    assert ended.result["json"][:2] == [0, '["apple", "[b]milk\\u001b[2J"]\n']
    assert (ended.result["missing"][0], ended.result["near"][0]) == (2, 2)
    assert "error: unknown run 'other'" in ended.stderr
    assert "did you mean 'products'" in ended.stderr
