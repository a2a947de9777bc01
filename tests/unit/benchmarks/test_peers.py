"""Peers do the work of the plain loop, in environments that are whole or made again."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import compare, limits, wire_limit
from benchmarks.journal import ROOT
from benchmarks.measure import Sample
from benchmarks.peers import contenders, environments, job, prepare
from benchmarks.peers.wire_rounds import WireRounds
from tests.unit.benchmarks.conftest import TINY


def trained(*losses: float) -> Sample:
    figures = {"train_loss": list(losses)}
    return Sample(seconds=1.0, cpu_seconds=1.0, peak_mb=1.0, processes=1, first_step=None, figures=figures)


def test_averaging_what_a_peers_stores_train_is_the_plain_loop(folder: Path, tmp_path: Path) -> None:
    expected = limits.run(TINY, folder, processes=1, threads=1)
    prepare.export(TINY, folder, tmp_path)
    read = job.Job.load(tmp_path)
    store, report = job.Store(read), job.Report()
    weights = {name: value.clone() for name, value in store.module.state_dict().items()}
    for number in range(1, read.num_rounds + 1):
        losses, deltas = [], []
        for slot in range(read.cohort_size):
            store.module.load_state_dict(weights)
            losses.append(store.fit(number, slot))
            deltas.append({name: value - weights[name] for name, value in store.module.state_dict().items()})
        for name, value in weights.items():
            weights[name] = value + torch.stack([delta[name].double() for delta in deltas]).mean(0).float()
        store.module.load_state_dict(weights)
        report.end_round(float(np.mean(losses)), job.accuracy(read, store.module))
    figures = report.figures()
    assert figures["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-6)
    assert figures["test_accuracy"] == expected["test_accuracy"]
    assert len(figures["round_seconds"]) == read.num_rounds - 1


def test_a_run_of_one_round_tells_that_rounds_seconds() -> None:
    report = job.Report()
    report.start()
    report.end_round(1.0, None)
    assert len(report.figures()["round_seconds"]) == 1
    assert "test_accuracy" not in report.figures()


def test_fewer_rounds_are_the_first_rounds(folder: Path, tmp_path: Path) -> None:
    read = []
    for rounds in (1, 2):
        out = tmp_path / str(rounds)
        out.mkdir()
        prepare.export(replace(TINY, num_rounds=rounds), folder, out)
        read.append(job.Job.load(out))
    assert np.array_equal(read[0].rows, read[1].rows[:1])
    assert np.array_equal(read[0].cohorts, read[1].cohorts[:1])


def test_what_peers_import_of_ours_needs_nothing_of_fedshelf() -> None:
    code = (
        "import sys, benchmarks.peers.job, benchmarks.peers.wire_rounds, benchmarks.peers.processes\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('fedshelf', 'psutil', 'platformdirs')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "[]"


def test_a_server_that_misses_a_clients_change_is_found_out() -> None:
    rounds = WireRounds(1)
    rounds.begin()
    for _ in range(wire_limit.NUM_ROUNDS):
        rounds.end_round()
    model = rounds.first_model()
    for number in range(1, wire_limit.NUM_ROUNDS + 1):
        model += np.float32(np.mean([wire_limit.change(client, number) for client in range(wire_limit.NUM_CLIENTS)]))
    assert '"server_peak_mb"' in rounds.figures(model)
    with pytest.raises(ValueError, match="not the mean"):
        rounds.figures(model - 1)


def test_roundings_are_allowed_after_the_first_round_only() -> None:
    limit = trained(3.8, 3.5, 3.4)
    assert compare.of_peer(trained(3.8, 3.502), limit).all == pytest.approx(0.002)
    with pytest.raises(compare.DifferentWorkError, match=r"off by 0.001 in the first round"):
        compare.of_peer(trained(3.801, 3.5, 3.4), limit)


@pytest.mark.parametrize("losses", [(3.8, 3.8, 3.8), (3.8, 3.5, 3.35), (), (3.8, 3.5, 3.4, 3.3)])
def test_a_peer_that_did_other_work_is_found_out(losses: tuple[float, ...]) -> None:
    with pytest.raises(compare.DifferentWorkError):
        compare.of_peer(trained(*losses), trained(3.8, 3.5, 3.4))


@pytest.mark.parametrize("peer", [*contenders.SIMULATORS, *contenders.DEPLOYMENTS], ids=lambda peer: peer.command[-1])
def test_every_peer_is_pinned_and_has_its_program(peer: contenders.Peer) -> None:
    name, _, version = peer.version().partition(" ")
    assert name in ("flwr", "nvflare", "pfl")
    assert version.replace(".", "").isdigit()
    module = next(part for part in reversed(peer.command) if part.startswith("benchmarks."))
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file()


def test_an_environment_that_broke_off_or_is_outdated_is_made_again(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements"
    requirements.mkdir()
    (requirements / "tiny.txt").write_text("# nothing\n")
    folder = tmp_path / "environments" / "tiny"
    folder.mkdir(parents=True)
    left = folder / "left"
    left.touch()  # of a making that broke off
    python = environments.python_of("tiny", tmp_path, requirements=requirements)
    assert not left.exists()
    assert subprocess.run([python, "-c", ""], timeout=60, check=False).returncode == 0
    left.touch()
    environments.python_of("tiny", tmp_path, requirements=requirements)
    assert left.exists()
    (requirements / "tiny.txt").write_text("./not-there\n")
    with pytest.raises(environments.NoEnvironmentError, match=r"tiny could not be made: see .*tiny.log"):
        environments.python_of("tiny", tmp_path, requirements=requirements)
    assert not left.exists()
