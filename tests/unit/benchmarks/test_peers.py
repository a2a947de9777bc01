"""Peers do the work of the plain loop, in environments that are complete or made again."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import processes, training, training_limit, wire_limit
from benchmarks.measure import Sample
from benchmarks.peers import environments, export_workload, exported_workload, registry
from benchmarks.samples import ROOT
from tests.unit.benchmarks.conftest import TINY


def trained(*losses: float) -> Sample:
    figures = {"train_loss": list(losses)}
    return Sample(seconds=1.0, cpu_seconds=1.0, peak_mb=1.0, processes=1, first_step=None, figures=figures)


def test_averaging_what_a_peers_stores_train_is_the_plain_loop(folder: Path, tmp_path: Path) -> None:
    expected = training_limit.run(TINY, folder, processes=1, threads=1)
    export_workload.export(TINY, folder, tmp_path)
    read = exported_workload.ExportedWorkload.load(tmp_path)
    trainer, figures = exported_workload.LocalTrainer(read), exported_workload.RunFigures()
    weights = {name: value.clone() for name, value in trainer.module.state_dict().items()}
    for number in range(1, read.num_rounds + 1):
        losses, deltas = [], []
        for slot in range(read.cohort_size):
            trainer.module.load_state_dict(weights)
            losses.append(trainer.fit(number, slot))
            deltas.append({name: value - weights[name] for name, value in trainer.module.state_dict().items()})
        for name, value in weights.items():
            weights[name] = value + torch.stack([delta[name].double() for delta in deltas]).mean(0).float()
        trainer.module.load_state_dict(weights)
        figures.end_round(float(np.mean(losses)), exported_workload.accuracy(read, trainer.module))
    found = figures.to_dict()
    assert found["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-6)
    assert found["test_accuracy"] == expected["test_accuracy"]
    assert len(found["round_seconds"]) == read.num_rounds - 1


def test_a_run_of_one_round_reports_the_seconds_of_that_round() -> None:
    figures = exported_workload.RunFigures()
    figures.start()
    figures.end_round(1.0, None)
    assert len(figures.to_dict()["round_seconds"]) == 1
    assert "test_accuracy" not in figures.to_dict()


def test_fewer_rounds_are_the_first_rounds(folder: Path, tmp_path: Path) -> None:
    read = []
    for rounds in (1, 2):
        out = tmp_path / str(rounds)
        out.mkdir()
        export_workload.export(replace(TINY, num_rounds=rounds), folder, out)
        read.append(exported_workload.ExportedWorkload.load(out))
    assert np.array_equal(read[0].rows, read[1].rows[:1])
    assert np.array_equal(read[0].cohorts, read[1].cohorts[:1])


def test_peers_need_no_package_of_fedshelfs_environment() -> None:
    code = (
        "import sys, benchmarks.peers.exported_workload, benchmarks.wire_limit, benchmarks.processes\n"
        "found = {name for name in sys.modules if name.partition('.')[0] in ('fedshelf', 'psutil', 'platformdirs')}\n"
        "print(*sorted(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["fedshelf", "fedshelf.core", "fedshelf.core.process_exit"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [("raise SystemExit(3)", "exit code 3"), ("import os; os.abort()", r"was ended by SIGABRT")],
)
def test_a_peers_process_that_fails_is_named_with_its_exit(code: str, reason: str) -> None:
    command = [sys.executable, "-c", code]
    with pytest.raises(SystemExit, match=reason):
        processes.run(command, environment={})
    with processes.running(command, environment={}) as process, pytest.raises(SystemExit, match=reason):
        processes.wait_for_port(processes.free_ports(1)[0], process)


def test_a_server_that_misses_a_clients_change_is_detected() -> None:
    rounds = wire_limit.WireRounds(1)
    rounds.begin()
    for _ in range(wire_limit.NUM_ROUNDS):
        rounds.end_round()
    model = rounds.first_model()
    for number in range(1, wire_limit.NUM_ROUNDS + 1):
        model += np.float32(np.mean([wire_limit.change(client, number) for client in range(wire_limit.NUM_CLIENTS)]))
    assert '"server_peak_mb"' in rounds.figures(model)
    with pytest.raises(ValueError, match="not the mean"):
        rounds.figures(model - 1)


def test_rounding_errors_are_allowed_after_the_first_round_only() -> None:
    limit = trained(3.8, 3.5, 3.4)
    assert training.peer_loss_difference(trained(3.8, 3.502), limit).all == pytest.approx(0.002)
    with pytest.raises(training.DifferentWorkError, match=r"differ by 0.001 in the first round"):
        training.peer_loss_difference(trained(3.801, 3.5, 3.4), limit)


@pytest.mark.parametrize("losses", [(3.8, 3.8, 3.8), (3.8, 3.5, 3.35), (), (3.8, 3.5, 3.4, 3.3)])
def test_a_peer_that_did_other_work_is_detected(losses: tuple[float, ...]) -> None:
    with pytest.raises(training.DifferentWorkError):
        training.peer_loss_difference(trained(*losses), trained(3.8, 3.5, 3.4))


@pytest.mark.parametrize("peer", [*registry.SIMULATORS, *registry.DEPLOYMENTS], ids=lambda peer: peer.command[-1])
def test_every_peer_is_pinned_and_has_its_program(peer: registry.Peer) -> None:
    name, _, version = peer.version().partition(" ")
    assert name in ("flwr", "nvflare", "pfl")
    assert version.replace(".", "").isdigit()
    module = next(part for part in reversed(peer.command) if part.startswith("benchmarks."))
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file()


def test_an_incomplete_or_outdated_environment_is_made_again(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements"
    requirements.mkdir()
    (requirements / "tiny.txt").write_text("# nothing\n")
    folder = tmp_path / "environments" / "tiny"
    folder.mkdir(parents=True)
    left = folder / "left"
    left.touch()  # by an interrupted attempt
    python = environments.python_of("tiny", tmp_path, requirements=requirements)
    assert not left.exists()
    assert subprocess.run([python, "-c", ""], timeout=60, check=False).returncode == 0
    left.touch()
    environments.python_of("tiny", tmp_path, requirements=requirements)
    assert left.exists()
    (requirements / "tiny.txt").write_text("./not-there\n")
    with pytest.raises(environments.PeerEnvironmentError, match=r"tiny could not be made: see .*tiny.log"):
        environments.python_of("tiny", tmp_path, requirements=requirements)
    assert not left.exists()
