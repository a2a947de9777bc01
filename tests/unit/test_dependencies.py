"""Ranges for users, exact versions for CI, and both ends of each range are ones that are tested."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = [
    Requirement(line) for name, lines in PROJECT["optional-dependencies"].items() if name != "all" for line in lines
]


def pins(file: str) -> dict[str, Version]:
    found = [Requirement(line) for line in (ROOT / file).read_text().splitlines() if line and line[0] != "#"]
    return {pin.name: Version(str(pin.specifier).removeprefix("==")) for pin in found}


@pytest.mark.parametrize("needed", [*RUNTIME, *EXTRAS], ids=lambda needed: needed.name)
def test_ci_tests_with_one_version_of_each_dependency(needed: Requirement) -> None:
    assert pins("constraints.txt")[needed.name] in needed.specifier


@pytest.mark.parametrize("needed", RUNTIME, ids=lambda needed: needed.name)
def test_the_lower_end_of_each_range_is_what_the_command_for_it_installs(needed: Requirement) -> None:
    (lower,) = [part for part in needed.specifier if part.operator in (">=", "==")]
    assert pins("constraints-low.txt")[needed.name] == Version(lower.version)


def test_the_distribution_for_tills_has_the_same_ranges() -> None:
    edge = tomllib.loads((ROOT / "packaging/edge/pyproject.toml").read_text())["project"]
    ranges = {needed.name: needed.specifier for needed in [*RUNTIME, *EXTRAS]}
    extras = [line for lines in edge["optional-dependencies"].values() for line in lines]
    for needed in map(Requirement, [*edge["dependencies"], *extras]):
        assert needed.specifier == ranges[needed.name], needed.name


def test_only_flower_is_pinned_exactly() -> None:
    exact = [needed.name for needed in RUNTIME if any(part.operator == "==" for part in needed.specifier)]
    assert exact == ["flwr"], "docs/adr/0002-embed-flower.md"
