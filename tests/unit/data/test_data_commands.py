"""`fedshelf data …` as a person types it."""

import json
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import pytest

from fedshelf.core.errors import DataError, UsageError
from tests.unit.data.samples import write_pack

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # typer still imports names that newer click deprecates
    from typer.testing import CliRunner

    from fedshelf.cli.data import app

REAL = Path(__file__).parents[4] / "shared" / "data"


def run(*arguments: object) -> str:
    """Standard output of a command that must succeed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("command", ["partition", "make-demo", "fetch", "synthetic-sales", "check"])
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    assert f"Example: fedshelf data {command}" in " ".join(run(command, "--help").split())


def test_partition_deals_and_says_how_many(tmp_path: Path) -> None:
    write_pack(tmp_path / "pack", {"A": 10, "B": 10})
    out = tmp_path / "stores"
    counts = json.loads(run("partition", tmp_path / "pack", "--out", out, "--mode", "iid", "--stores", 2, "--json"))
    assert counts["stores"] == {"store-1": 10, "store-2": 10}
    assert len(list(out.rglob("*.png"))) == 20


def test_synthetic_sales_are_written_next_to_the_photos_of_each_store(tmp_path: Path) -> None:
    for name in ("lyon", "oslo"):
        write_pack(tmp_path / "stores" / name, {"A": 3})
    write_pack(tmp_path / "test", {"A": 2})
    flags = ("--test-dir", tmp_path / "test", "--listed", 1, "--gamma", 0)
    assert json.loads(run("synthetic-sales", tmp_path / "stores", *flags, "--json")) == {
        "stores": {"lyon": 728, "oslo": 728}
    }
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.csv")) == [
        "stores/lyon/photos.csv", "stores/lyon/sales.csv", "stores/oslo/photos.csv", "stores/oslo/sales.csv",
        "test/photos.csv",
    ]  # fmt: skip


def test_partition_follows_an_assignment(tmp_path: Path) -> None:
    write_pack(tmp_path / "pack", {"train/A": 2})
    (tmp_path / "who.csv").write_text("photo,store\ntrain/A/000.png,x\ntrain/A/001.png,y\n")
    run("partition", tmp_path / "pack", "--out", tmp_path / "stores", "--assignment", tmp_path / "who.csv")
    assert (tmp_path / "stores/x/A/000.png").exists()
    assert (tmp_path / "stores/y/A/001.png").exists()


def test_make_demo_draws_where_it_says(tmp_path: Path) -> None:
    made = json.loads(run("make-demo", tmp_path / "demo", "--photos-per-class", 5, "--image-size", 32, "--json"))
    assert made["num_train"] == len(list(Path(made["stores"]).rglob("*.jpg"))) == 60
    assert made["num_test"] == len(list(Path(made["test"]).rglob("*.jpg")))


def test_check_prints_what_it_found_and_as_json(tmp_path: Path) -> None:
    write_pack(tmp_path, {"A": 3})
    (tmp_path / "A" / "bad.jpg").touch()
    assert "'A/bad.jpg': the file is empty" in run("check", tmp_path)
    assert json.loads(run("check", tmp_path, "--json"))["unusable"] == {"A/bad.jpg": "the file is empty"}


def test_mistakes_are_raised_for_the_command_line_to_print(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        run("check", tmp_path / "nowhere")
    with pytest.raises(UsageError, match="unknown photo set 'fruit'"):
        run("fetch", "fruit")


@pytest.mark.parametrize("arguments", [["partition", "x"], ["partition", "x", "--out", "y", "--mode", "random"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_the_commands_can_be_listed_without_loading_torch() -> None:
    code = "import sys, fedshelf.cli.data; print([m for m in ('torch', 'cv2', 'numpy', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def groceries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("groceries")
    with tarfile.open(REAL / "groceries-128.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    (train,) = folder.glob("**/train")
    return train.parent


@pytest.mark.real_data
@pytest.mark.skipif(not (REAL / "splits").exists(), reason=f"the real photos are not at {REAL}")
@pytest.mark.parametrize("mode", ["iid", "dirichlet", "assortment"])
def test_the_published_splits_of_the_groceries_can_be_dealt(tmp_path: Path, groceries: Path, mode: str) -> None:
    out = tmp_path / "stores"
    table = REAL / "splits" / f"{mode}-8-seed0.csv"
    counts = json.loads(run("partition", groceries, "--out", out, "--assignment", table, "--json"))["stores"]
    assert (len(counts), sum(counts.values())) == (8, 2640)
    photos = [path.relative_to(out).parts[1:] for path in out.rglob("*.jpg")]
    assert len(set(photos)) == len(photos) == 2640
    assert {parts[0] for parts in photos} == {"Fruit", "Packages", "Vegetables"}
