"""The pages that describe the structure name what there is: packages, layers, and the way of an upload."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "fedshelf"
ARCHITECTURE = ROOT / "docs" / "explanation" / "architecture.md"
A_ROUND = ROOT / "docs" / "explanation" / "a-round.md"
MOST_FILES = 20  # from the trainer to the new model


def packages() -> set[str]:
    return {path.parent.name for path in SOURCE.glob("*/__init__.py")}


def test_the_architecture_page_lists_every_package() -> None:
    table = ARCHITECTURE.read_text(encoding="utf-8").split("## Packages")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == packages()


def test_the_contributors_page_lists_every_package_and_calls_none_empty() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = page.split("## Where things are")[1].split("\n## ")[0].splitlines()
    listed = [name for row in rows if row.startswith("| `") for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(listed) == sorted(packages())
    assert "empty" not in page


def test_every_package_has_its_layer_and_the_page_has_them_in_that_order() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (layers,) = [contract for contract in contracts["contracts"] if contract["type"] == "layers"]
    order = [set(re.findall(r"\w+", layer)) - {"__main__"} for layer in layers["layers"]]
    assert set().union(*order) == packages()
    table = ARCHITECTURE.read_text(encoding="utf-8").split("## Packages")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)
    ranks = [next(rank for rank, layer in enumerate(order) if name in layer) for name in listed]
    assert ranks == sorted(ranks)


def test_the_way_of_an_upload_is_of_files_that_exist_and_short() -> None:
    section = A_ROUND.read_text(encoding="utf-8").split("## The way of an upload")[1].split("\n## ")[0]
    files = re.findall(r"^\| \d+ \| `([\w/]+\.py)`", section, flags=re.MULTILINE)
    assert [file for file in files if not (SOURCE / file).is_file()] == []
    assert 10 < len(files) <= MOST_FILES


def test_rounds_know_no_file_network_or_clock() -> None:
    forbidden = re.compile(r"^\s*(?:import|from) (?:os|time|socket|pathlib|http|fedshelf\.storage)\b", re.MULTILINE)
    found = [path.name for path in (SOURCE / "rounds").glob("*.py") if forbidden.search(path.read_text("utf-8"))]
    assert found == []
