"""What simulated clients remember: the same whoever plays them, and after whatever interruption."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from fedshelf.algorithms import registry
from fedshelf.core.errors import RunError
from fedshelf.core.messages import Broadcast, Purpose, TaskKey, Upload
from fedshelf.core.state import ClientState
from fedshelf.simulate import processes
from fedshelf.simulate.states import SimulatedStates
from fedshelf.storage.checkpoints import FileCheckpoints
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.tracking.queries import run_summary
from tests.unit.simulate import stateful


def final(directory: RunDirectory) -> torch.Tensor:
    state = FileCheckpoints(directory.checkpoints).load()
    assert state is not None
    return state.model.params


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.ALGORITHMS, "fedavg", f"{stateful.__name__}:Halves")
    monkeypatch.setattr(processes, "THREADED", frozenset())  # a worker that is spawned has another registry


@pytest.mark.slow
@pytest.mark.usefixtures("halves")
def test_a_client_remembers_the_same_whoever_plays_it(home: Path) -> None:
    finals = [final(stateful.simulate(Path(f"w{workers}"), workers=workers)[1]) for workers in (0, 1, 2)]
    assert torch.equal(finals[0], finals[1])
    assert torch.equal(finals[0], finals[2])


def test_the_algorithm_of_these_tests_needs_its_memory(home: Path, halves: None) -> None:
    """Else equality would show nothing."""
    remembered = final(stateful.simulate(Path("remembered"), workers=0)[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimulatedStates, "commit_or_rollback", lambda self, broadcast: ClientState())
        forgotten = final(stateful.simulate(Path("forgotten"), workers=0)[1])
    assert not torch.equal(remembered, forgotten)


@pytest.mark.slow
@pytest.mark.parametrize("round", [2, 4])
def test_a_simulation_that_is_killed_and_gone_on_with_equals_an_uninterrupted_one(
    home: Path, halves: None, round: int
) -> None:
    _, whole = stateful.simulate(Path("whole"), workers=0)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "tests.unit.simulate.stateful", "killed", "2"]
    with subprocess.Popen(command, env=environment) as process:
        checkpoint = Path("killed") / "checkpoints" / f"round-{round:06d}.safetensors"
        while not checkpoint.exists():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.001)
        workers = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive, "workers outlive their parent"
    checkpoints = sorted(int(path.stem[6:]) for path in checkpoint.parent.glob("round-*.safetensors"))
    assert checkpoints[-1] <= run_summary(Path("killed")).rounds[-1].round, "a checkpoint without its record"
    _, resumed = stateful.simulate(Path("killed"), workers=1)
    assert torch.equal(final(resumed), final(whole))


def task(round: int, counted: int | None) -> Broadcast:
    keys = [TaskKey(run_id="r", round=number, attempt=0) if number is not None else None for number in (round, counted)]
    assert keys[0] is not None
    return Broadcast(
        key=keys[0], purpose=Purpose.TRAIN, vectors={"params": torch.zeros(1)}, client_lr=0.1, counted=keys[1]
    )  # fmt: skip


def play(states: SimulatedStates, round: int, counted: int | None) -> float | None:
    """One round; its state is its number. Returns the number in the state it began with."""
    broadcast = task(round, counted)
    found = states.commit_or_rollback(broadcast).algorithm
    upload = Upload(
        key=broadcast.key, vectors={"delta": torch.zeros(1)}, num_examples=1, num_steps=1, train_loss=0.0, seconds=0.0
    )  # fmt: skip
    states.stage(broadcast.key, upload, ClientState(algorithm={"round": torch.tensor([float(round)])}))
    return found["round"].item() if found else None


def test_the_state_in_force_is_that_of_the_newest_upload_that_was_counted(tmp_path: Path) -> None:
    states = SimulatedStates(tmp_path, "lyon")
    assert play(states, 1, None) is None
    assert play(states, 3, 1) == 1
    assert play(states, 4, 1) == 1  # what round 3 led to was not counted
    assert play(states, 6, 4) == 4
    assert SimulatedStates(tmp_path, "oslo").commit_or_rollback(task(7, None)).is_empty


def test_a_run_may_begin_again_one_round_further_back(tmp_path: Path) -> None:
    states = SimulatedStates(tmp_path, "lyon")
    for number, counted in ((1, None), (2, 1), (3, 2)):
        play(states, number, counted)
    assert play(states, 2, 1) == 1
    assert play(states, 3, 2) == 2


def test_states_do_not_pile_up(tmp_path: Path) -> None:
    states = SimulatedStates(tmp_path, "lyon")
    play(states, 1, None)
    for number in range(2, 10):
        play(states, number, number - 1)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4  # just led to, in force, and two before that


def test_a_fast_client_of_asynchronous_rounds_can_go_back_to_where_the_newest_version_left_it(tmp_path: Path) -> None:
    """It has answered four times since the version before, and all of that is asked for again."""
    states = SimulatedStates(tmp_path, "lyon")
    tasks = [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (3, 3)]  # rounds and attempts
    counted: TaskKey | None = None
    for number, (round_, attempt) in enumerate(tasks):
        key = TaskKey(run_id="r", round=round_, attempt=attempt)
        broadcast = replace(task(round_, None), key=key, counted=counted)
        assert [tensor.item() for tensor in states.commit_or_rollback(broadcast).algorithm.values()] == [number - 1] * (
            number > 0
        )
        state = ClientState(algorithm={"number": torch.tensor([float(number)])})
        upload = Upload(
            key=key, vectors={"delta": torch.zeros(1)}, num_examples=1, num_steps=1, train_loss=0.0, seconds=0.0
        )
        states.stage(key, upload, state)
        counted = key
    again = replace(task(3, None), counted=TaskKey(run_id="r", round=2, attempt=1))
    assert states.commit_or_rollback(again).algorithm["number"].item() == 2
    further_back = replace(
        task(2, None), key=replace(again.key, round=2, attempt=1), counted=TaskKey(run_id="r", round=2, attempt=0)
    )
    assert states.commit_or_rollback(further_back).algorithm["number"].item() == 1


def test_clients_of_a_stateless_algorithm_have_no_files(tmp_path: Path) -> None:
    states, broadcast = SimulatedStates(tmp_path, "lyon"), task(1, None)
    state = states.commit_or_rollback(broadcast)
    upload = Upload(
        key=broadcast.key, vectors={"delta": torch.zeros(1)}, num_examples=1, num_steps=1, train_loss=0.0, seconds=0.0
    )
    states.stage(broadcast.key, upload, state)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_state_is_an_error_that_names_it(tmp_path: Path) -> None:
    states = SimulatedStates(tmp_path, "lyon")
    play(states, 1, None)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"state of a simulated client is lost: .*000001-000"):
        states.commit_or_rollback(task(2, 1))
