"""What a how-to page adds to FedShelf: a file, and a line in a registry."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedshelf.cli import main

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "how-to"
PRELUDE = '''
import json, sys
from fedshelf.cli import main

def fedshelf(*arguments):
    """The exit code of a command."""
    try:
        main(list(arguments))
    except SystemExit as ended:
        return ended.code or 0
    return 0

def simulate(*arguments):
    return fedshelf(
        "simulate", "--data-dir", "stores", "--rounds", "1", "--image-size", "16", "--width", "8", "--batch-size", "4",
        "--device", "cpu", "--local-epochs", "1", "--warmup-rounds", "0", "--val-fraction", "0",
        "--min-clients", "1", "--json", *arguments,
    )

'''


@dataclass(frozen=True, kw_only=True)
class Addition:
    """The code of a page.

    Attributes:
        path: of the new file.
        source: what is in it.
        registry: the file in which the line goes.
        table: the name of the dictionary there.
        line: the line.
    """

    path: str
    source: str
    registry: str
    table: str
    line: str

    @classmethod
    def of(cls, page: str) -> "Addition":
        """What the page of that name adds."""
        text = (PAGES / page).read_text(encoding="utf-8")
        source, line = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        path = re.search(r"^`(src/\S+)`", text, re.MULTILINE)
        place = re.search(r"^In `(src/\S+)`, among the `(\w+)`:", text, re.MULTILINE)
        assert path is not None
        assert place is not None
        return cls(path=path[1], source=source, registry=place[1], table=place[2], line=line)

    @property
    def entry(self) -> tuple[str, str]:
        """The name that is registered, and the component it stands for."""
        found = re.fullmatch(r'\s*"(\w+)": "([\w.:]+)",\s*', self.line)
        assert found is not None
        return found[1], found[2]

    def add_to(self, root: Path) -> None:
        """Do what the page says, in a copy of the project."""
        assert not (root / self.path).exists()
        (root / self.path).write_text(self.source, encoding="utf-8")
        registry = root / self.registry
        before = registry.read_text(encoding="utf-8")
        after = re.sub(rf"^({self.table}\b.*\{{)\n?", rf"\1\n{self.line}", before, flags=re.MULTILINE)
        assert self.line in after
        assert abs(len(after) - len(before) - len(self.line)) <= 1
        registry.write_text(after, encoding="utf-8")

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Do what the page says in this process, for a registry that is read when a component is used.

        Returns:
            The component.
        """
        name, component = self.entry
        module = ModuleType(component.partition(":")[0])
        assert self.path == f"src/{module.__name__.replace('.', '/')}.py"
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(self.source, self.path, "exec"), module.__dict__)
        registry = import_module(self.registry.removeprefix("src/").removesuffix(".py").replace("/", "."))
        monkeypatch.setitem(getattr(registry, self.table), name, component)
        return getattr(module, component.partition(":")[2])


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A program that has ended.

    Attributes:
        result: the last line that it printed, which is JSON.
        stderr: what it wrote to standard error.
    """

    result: Any
    stderr: str


def run_with(page: str, program: str, folder: Path) -> Ended:
    """Add what a page says to a copy of the project, and run a program there.

    Args:
        page: the page's name.
        program: Python that prints its result as JSON. It has `json`, `sys`, `fedshelf(*arguments)`, which returns a
            command's exit code, and `simulate(*arguments)`, which runs one round on the folder `stores`.
        folder: the working directory, which also holds the copy.

    Returns:
        The result, and what was written to standard error.
    """
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    Addition.of(page).add_to(folder)
    environment = {
        **os.environ, "PYTHONPATH": str(folder / "src"), "FEDSHELF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-c", PRELUDE + program], cwd=folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return Ended(result=json.loads(ended.stdout.splitlines()[-1]), stderr=ended.stderr)


def run_python(page: str) -> dict[str, Any]:
    """Run all of a page's Python, in one namespace, in this process and its working folder.

    Returns:
        The namespace.
    """
    text = (PAGES / page).read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for source in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(source, page, "exec"), namespace)
    for source in re.findall(r"```py\n(.*?)```", text, re.DOTALL):  # of other machines or projects
        compile(source, page, "exec")
    return namespace


def run(command: Sequence[str]) -> None:
    """Run a page's command in this process; it must succeed."""
    code: object = 0
    try:
        main(list(command))
    except SystemExit as ended:
        code = ended.code
    assert not code
