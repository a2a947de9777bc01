"""Puts those modules of FedShelf into the wheel that the command `fedshelf-edge` imports, directly or not."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = Path(__file__).resolve().parents[2] / "src"
COMMAND = "fedshelf.edge.till"
DATA = ("fedshelf/edge/serving/static", "fedshelf/edge/serving/browser_runtime")
TARGET = "fedshelf_edge/parts"


class Modules(BuildHookInterface):
    """The hook that hatchling calls."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the files."""
        folders = [path for name in DATA for path in (SOURCES / name).glob("*") if path.is_file()]
        for path in [*modules(), *folders]:
            build_data["force_include"][str(path)] = f"{TARGET}/{path.relative_to(SOURCES).as_posix()}"


def modules() -> list[Path]:
    """The source files of the command and of all that it imports from FedShelf."""
    found: set[Path] = set()
    waiting = [COMMAND]
    while waiting:
        path = _file(waiting.pop())
        if path is None or path in found:
            continue
        found.add(path)
        found.update(folder / "__init__.py" for folder in path.parents if folder.is_relative_to(SOURCES / "fedshelf"))
        waiting += _imports(path)
    return sorted(found)


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def _file(module: str) -> Path | None:
    if module.split(".")[0] != "fedshelf":
        return None
    base = SOURCES.joinpath(*module.split("."))
    return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)
