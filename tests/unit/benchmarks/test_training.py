"""What is made of the samples of *pilot* and *chain*, and what the command line prints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command_line
from benchmarks import training
from benchmarks.measure import Sample
from benchmarks.workloads import PILOT


def sample(seconds: float, losses: list[float], round_seconds: float) -> Sample:
    figures = {"train_loss": losses, "round_seconds": [round_seconds] * 2}
    return Sample(seconds=seconds, cpu_seconds=1.0, peak_mb=1.0, processes=1, first_step=None, figures=figures)


LOSSES = [3.8, 3.5, 3.4, 3.3, 3.2]
LIMIT = [sample(20.0, LOSSES, 4.0), sample(30.0, LOSSES, 5.0), sample(22.0, LOSSES, 4.0)]


def test_a_ratio_is_that_of_the_medians_of_wall_clock() -> None:
    found = training.figures_of(PILOT, [sample(s, LOSSES, 9.0) for s in (33.0, 10.0, 90.0)], LIMIT)
    assert (found.seconds, found.ratio, found.whole) == (33.0, 1.5, True)


def test_who_ran_fewer_rounds_is_compared_by_seconds_per_round() -> None:
    found = training.figures_of(PILOT, [sample(15.0, LOSSES[:1], 10.0)] * 3, LIMIT)
    assert (found.ratio, found.rounds, found.whole) == (2.5, 1, False)


def test_a_peer_that_did_other_work_is_failed_with_its_reason() -> None:
    samples = {
        "limit": LIMIT, "FedShelf": LIMIT, "good": [sample(1.0, LOSSES[:2], 1.0)] * 3,
        "sometimes bad": [*LIMIT[:2], sample(1.0, [3.7, 3.5], 1.0)],
    }  # fmt: skip
    failed = {"late": "timed out"}
    assert list(training.peers_distances(samples, failed)) == ["good"]
    assert failed["late"] == "timed out"
    assert "off by 0.1 in the first round" in failed["sometimes bad"]


def test_the_section_says_how_to_measure_the_same_again() -> None:
    typed = ["wire", "--runs", "7", "--insecure", "--peers", "--megabytes", "10", "--json"]
    arguments = command_line.parse(typed)
    assert command_line.command(arguments) == "python -m benchmarks wire --runs 7 --insecure --peers --megabytes 10"
    assert command_line.section(arguments) == "wire, without TLS"
    many = command_line.parse(["wire", "--clients", "16", "--runs", "1"])
    assert command_line.command(many) == "python -m benchmarks wire --runs 1 --clients 16"
    assert command_line.section(many) == "wire, 16 clients"
    assert command_line.command(command_line.parse(["pilot"])) == "python -m benchmarks pilot --runs 5"


@pytest.mark.e2e
@pytest.mark.slow
def test_the_contract_is_printed_and_the_samples_are_put_aside(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "wire", "--runs", "1", "--megabytes", "1", "--clients", "2"]
    command += ["--json", "--work", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    contract = json.loads(done.stdout)
    assert set(contract) == {"ours", "limit", "ratio", "peak_mb"}
    assert contract["ratio"] == pytest.approx(contract["ours"] / contract["limit"], rel=0.05)
    (kept,) = (tmp_path / "samples").iterdir()
    assert len(kept.read_text().splitlines()) == 2
    assert kept.stem.count("-") == 3  # wire, code, day, time: nothing goes on from it
