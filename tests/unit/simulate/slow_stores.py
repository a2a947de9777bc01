"""A simulation with slow stores, deadlines and dropout, in this process or as a program that can be killed:

python -m tests.unit.simulate.slow_stores RUN_DIR NUM_WORKERS
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedshelf.config.schema import RunConfig
from fedshelf.core.events import RoundFinished, RunStatus
from fedshelf.core.state import ServerState
from fedshelf.simulate.engine import simulate_in_memory
from fedshelf.storage.checkpoints import FileCheckpoints
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.tracking.queries import run_summary
from tests.unit.simulate.federations import CLASSES, photos

SIZE = 8
NUM_PHOTOS = 20  # of each store: 0.2 virtual seconds for an epoch at slowness 1

ROUGH: dict[str, Any] = {
    "rounds": 8, "slowdowns": "1,1.5,4,2,1.1", "dropout": 0.25, "round_timeout": 0.45, "quorum": 2, "fraction": 0.8,
}  # fmt: skip
"""A run in which everything happens: late stores, stores that break off, void attempts, stores that are not drawn."""


def network(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, num_classes))


def config(**values: Any) -> RunConfig:
    given: dict[str, Any] = {
        "image_size": SIZE, "rounds": 3, "batch_size": 8, "local_epochs": 1, "client_lr": 0.02, "warmup_rounds": 0,
        "lr_schedule": "constant", "val_fraction": 0.0, "augment": False, "device": "cpu",
    }  # fmt: skip
    return RunConfig(**{**given, **values})


def simulate(names: str, run_dir: Path, *, test: bool = True, **values: Any) -> tuple[RunStatus, RunDirectory]:
    """Stores of one letter each, with `NUM_PHOTOS` photos each."""
    options = {name: values.pop(name) for name in ("watchers", "stop") if name in values}
    return simulate_in_memory(
        config(run_dir=run_dir, **values),
        stores={name: photos(seed, NUM_PHOTOS, SIZE) for seed, name in enumerate(names)},
        test=photos(99, 300, SIZE) if test else None, class_names=CLASSES, model=network, **options,
    )  # fmt: skip


def state_of(directory: RunDirectory) -> ServerState:
    state = FileCheckpoints(directory.checkpoints).load()
    assert state is not None
    return state


def rounds_of(directory: RunDirectory) -> tuple[RoundFinished, ...]:
    return run_summary(directory.path).rounds


def history(directory: RunDirectory) -> list[Any]:
    """All that a run comes to but for real time and bytes (a resumed server does not know what clients still hold)."""
    summary = run_summary(directory.path)
    rounds = [
        (record.round, record.virtual_seconds, record.train_loss, record.central_accuracy,
         [(member.client, member.status, member.reason) for member in record.clients])
        for record in summary.rounds
    ]  # fmt: skip
    return [rounds, [(void.round, void.attempt, void.reason) for void in summary.voids]]


def out_of(directory: RunDirectory) -> list[Any]:
    """What was out at the last checkpoint."""
    flights = state_of(directory).in_flight
    return [(f.client, f.key.round, f.key.attempt, f.due, f.leaves, f.wanted) for f in flights]


if __name__ == "__main__":
    torch.set_num_threads(1)
    simulate("abcde", Path(sys.argv[1]), workers=int(sys.argv[2]), **ROUGH)
