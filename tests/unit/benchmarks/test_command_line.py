"""`python -m benchmarks`: what it accepts, what it writes down, and how it ends."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from benchmarks import digests, results
from benchmarks.__main__ import STUDIES, app
from benchmarks.measure import MeasurementError
from benchmarks.photos import PhotosMissingError
from benchmarks.samples import ROOT

COMMANDS = (
    "pilot", "chain", "wire", *(one.name for one in STUDIES), "acceptance", "demo", "drift", "sales", "distillation",
    "scale", "secagg", "he", "edge", "dp-step", "guard", "digests",
)  # fmt: skip


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    shown = CliRunner().invoke(app, [name, "--help"])
    assert shown.exit_code == 0
    assert "--help" in shown.output


def test_the_documentation_names_every_command() -> None:
    page = (ROOT / "docs" / "how-to" / "benchmarks.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"`{name}`" not in page] == []
    assert {command.name for command in app.registered_commands} == set(COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("wire", "--clients", "3"), "power of two"),
        (("wire", "--clients", "8", "--peers"), "and 4 with --peers"),
        (("pilot", "--runs", "0"), "--runs"),
        (("skew", "--only", "nobody"), "Invalid value for '--only': 'nobody' is not one of"),
    ],
)
def test_wrong_usage_is_refused(arguments: tuple[str, ...], reason: str) -> None:
    refused = CliRunner().invoke(app, list(arguments))
    assert refused.exit_code == 2
    assert reason in " ".join(refused.output.replace("│", " ").split())


def test_the_section_names_the_command_that_measures_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "PATH", tmp_path / "RESULTS.md")
    arguments = ["tuning", "--recorded", "--seed", "0", "--seed", "1", "--workers", "3", "--work", "x", "--write"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert "`python -m benchmarks tuning --seed 0 --seed 1 --workers 3`" in results.PATH.read_text(encoding="utf-8")


def test_a_benchmark_without_its_photos_is_skipped(tmp_path: Path) -> None:
    skipped = run("chain", "--photos", str(tmp_path), "--work", str(tmp_path / "work"))
    assert skipped.returncode == PhotosMissingError.exit_code == 77
    assert f"error: skipped: '{tmp_path}' holds no groceries-128.tar.gz" in skipped.stderr
    assert "Traceback" not in skipped.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("acceptance", "--work", "x"), ("algorithms", "--work", "x", "--seed", "7"), ("drift", "--work", "x"),
        ("digests", "--checkout-src", str(ROOT / "src")),
    ],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_every_command_that_needs_photos_says_when_they_are_missing(arguments: tuple[str, ...], tmp_path: Path) -> None:
    skipped = CliRunner().invoke(app, [*arguments, "--photos", str(tmp_path)])
    assert isinstance(skipped.exception, PhotosMissingError)


@pytest.mark.e2e
@pytest.mark.slow
def test_the_figures_are_printed_as_json_and_the_samples_are_kept(tmp_path: Path) -> None:
    done = run("wire", "--runs", "1", "--megabytes", "1", "--clients", "2", "--json", "--work", str(tmp_path))
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert set(figures) == {"ours", "limit", "ratio", "peak_mb"}
    assert figures["ratio"] == pytest.approx(figures["ours"] / figures["limit"], rel=0.05)
    (kept,) = (tmp_path / "samples").glob("*.jsonl")
    assert len(kept.read_text().splitlines()) == 2
    assert kept.stem.count("-") == 3  # wire, code, day, time: nothing resumes from it


def save_model(folder: Path, **tensors: list[float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.array(values, dtype=np.float32) for name, values in tensors.items()}
    save_file(arrays, folder / "model.safetensors")


def test_the_digest_of_a_run_tells_every_bit_of_every_final_model(tmp_path: Path) -> None:
    found = set()
    for number, (model, own) in enumerate([(1.0, 2.0), (1.0, 2.0), (1.0 + 2**-23, 2.0), (1.0, 2.0 + 2**-22)]):
        save_model(tmp_path / str(number) / "model", weight=[model], bias=[0.0])
        save_model(tmp_path / str(number) / "stores" / "store-1", weight=[own])
        found.add(digests.model_digest(tmp_path / str(number)))
    assert len(found) == 3
    with pytest.raises(MeasurementError, match="there is no model in"):
        digests.model_digest(tmp_path / "none")


def test_digests_of_a_folder_that_is_no_checkout_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="give the 'src' folder of a checkout"):
        next(digests.digests(tmp_path, tmp_path, tmp_path, ["FedAvg"]))
