"""kill -9 of a real process that writes: what is found afterwards is whole, and nothing promised is missing."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fedshelf.core.events import RunStatus
from fedshelf.storage.checkpoints import FileCheckpoints
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.tracking.database import RunDatabase
from fedshelf.tracking.queries import run_summary

SERVER = """
import sys
from pathlib import Path
import torch
from fedshelf.core.events import RoundFinished, RunStarted
from fedshelf.core.messages import TaskKey
from fedshelf.core.state import Best, ModelState, OpenRound, ServerState
from fedshelf.storage.checkpoints import FileCheckpoints
from fedshelf.tracking.database import RunDatabase
from fedshelf.storage.run_directory import RunDirectory

run = RunDirectory.open(Path(sys.argv[1]))
lock = run.lock()
checkpoints = FileCheckpoints(run.checkpoints)
database = RunDatabase(run.database)
state = checkpoints.load()
first = 1 if state is None else state.round + 1
database.emit(RunStarted(run_id=run.run_id, num_rounds=10**6, first_round=first, num_parameters=1, num_classes=1,
                         min_clients=1))
for round_ in range(first, 10**6):
    checkpoints.save_open_round(OpenRound(key=TaskKey(run_id=run.run_id, round=round_, attempt=1), cohort=("a",)))
    database.emit(RoundFinished(round=round_, attempt=1, clients=(), train_loss=1.0, accuracy=None,
                                central_accuracy=None, central_loss=None, seconds=1.0, bytes_up=1, bytes_down=1,
                                best_round=round_))
    best = Best(round=round_, value=0.1, metric="accuracy")
    state = ServerState(round=round_, model=ModelState(params=torch.full((300_000,), float(round_))), best=best)
    checkpoints.save(state, is_best=True)
    print(round_, flush=True)
"""


def run_and_kill(path: Path, *, after_rounds: int, seconds_more: float) -> int:
    """Start the writer, kill it somewhere in a later round; returns the last round it had promised."""
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    promised = 0
    for _ in range(after_rounds):
        promised = int(process.stdout.readline())
    time.sleep(seconds_more)  # where in its work the kill hits is left to chance
    process.kill()
    rest = process.stdout.read().splitlines()
    process.stdout.close()
    process.wait()
    return int(rest[-1]) if rest else promised


@pytest.mark.slow
def test_kill_9_while_checkpoints_are_written_loses_no_finished_round(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", run_id="r", config_toml="", config_digest="d")
    promised = 0
    for delay in (0.0, 0.0137, 0.0291):
        promised = max(promised, run_and_kill(run.path, after_rounds=3, seconds_more=delay))

        state = FileCheckpoints(run.checkpoints).load()
        assert state is not None
        assert promised <= state.round <= promised + 1
        assert torch.equal(state.model.params, torch.full((300_000,), float(state.round)))
        open_round = FileCheckpoints(run.checkpoints).load_open_round()
        assert open_round is not None
        assert open_round.key.round in (state.round, state.round + 1)

        summary = run_summary(run.path)
        assert summary.status is RunStatus.STOPPED
        numbers = [round_.round for round_ in summary.rounds]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) in (state.round, state.round + 1)
    RunDatabase(run.database).close()
    with run.lock():
        assert [round_.round for round_ in run_summary(run.path).rounds] == numbers
