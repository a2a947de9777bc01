"""A server of asynchronous rounds killed anywhere, or out of disk, counts each upload once when it is started again.

Versions after a kill may be made of other uploads than without it: nobody waits for anybody. What must hold all the
same: each is made of as many as the buffer holds, no upload is in two of them or twice in one, and what a client keeps
between tasks is what its counted uploads made of it, in their order.
"""

import errno
import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedshelf.algorithms.base import Aggregate, Algorithm, Asynchronous
from fedshelf.core.errors import RunError
from fedshelf.core.events import ClientStatus, RunEnded, RunStatus
from fedshelf.core.messages import Broadcast, TaskKey, Upload
from fedshelf.core.state import ClientState, ModelState
from fedshelf.storage.checkpoints import FileCheckpoints
from fedshelf.storage.spool import FileSpool
from fedshelf.training.trainer import Trainer
from tests.examples import examples
from tests.property.rounds.test_crashes import Switch, fragile, run_with_kills
from tests.worlds import World

BUFFER = 3
ROUNDS = 5
DELAYS = {"a": 1.0, "b": 2.3, "c": 7.1}


@dataclass(frozen=True, kw_only=True)
class Telling(Algorithm, Asynchronous):
    """FedBuff whose uploads tell whose they are, which task they answer, and how many before it the client knows to be
    counted. `folded` says of each version what it was made of, when it was made last."""

    buffer_size: int = BUFFER
    auxiliary: tuple[str, ...] = ()
    folded: dict[int, list[tuple[int, TaskKey, int]]] = field(default_factory=dict)
    weighed: list[tuple[int, TaskKey, int]] = field(default_factory=list)

    def broadcast(self, state: ModelState, num_trainable: int) -> Mapping[str, Tensor]:
        self.weighed.clear()  # what a killed server had begun to fold
        return {}

    def client_round(self, broadcast: Broadcast, state: ClientState, trainer: Trainer) -> tuple[Upload, ClientState]:
        known = int(state.algorithm.get("known", torch.zeros(1)))
        upload = replace(trainer.upload(broadcast), num_steps=known)
        return upload, ClientState(algorithm={"known": torch.tensor([known + 1.0])})

    def weight(self, upload: Upload, staleness: int) -> float:
        self.weighed.append((upload.weight, upload.key, upload.num_steps or 0))  # no two stores have as many photos
        return 1.0

    def server_update(self, state: ModelState, aggregate: Aggregate, population: int) -> ModelState:
        version = state.optimizer.get("version", torch.zeros(1)) + 1
        self.folded[int(version)] = self.weighed[-BUFFER:]
        self.weighed.clear()
        return replace(state, params=state.params + aggregate.delta, optimizer={"version": version})


def fragile_world() -> tuple[World, Switch, Telling]:
    telling = Telling()
    world = World(num_rounds=ROUNDS, algorithm=telling, delays=dict(DELAYS))
    return world, fragile(world), telling


def assert_each_counted_once(world: World, telling: Telling) -> None:
    assert sorted(telling.folded) == list(range(1, ROUNDS + 1))
    assert {len(uploads) for uploads in telling.folded.values()} == {BUFFER}
    found = [(photos, key) for uploads in telling.folded.values() for photos, key, _ in uploads]
    assert max(Counter(found).values()) == 1, Counter(found).most_common(3)
    known: dict[int, list[int]] = {}
    for number in sorted(telling.folded):
        for photos, _, count in sorted(telling.folded[number], key=lambda upload: upload[2]):
            known.setdefault(photos, []).append(count)
    assert all(counts == list(range(len(counts))) for counts in known.values()), known
    records = {record.round: record for record in world.finished}
    for record in records.values():
        assert [m.status for m in record.clients].count(ClientStatus.COUNTED) == BUFFER
        assert record.accuracy is not None


def test_without_a_kill_each_upload_is_counted_once() -> None:
    world, _, telling = fragile_world()
    world.run()
    assert_each_counted_once(world, telling)
    assert {staleness for r in world.finished for m in r.clients for staleness in [m.staleness]} > {0, 1}


@pytest.mark.parametrize("restart_clients", [False, True])
def test_a_server_killed_at_any_one_step_counts_each_upload_once(restart_clients: bool) -> None:
    world, switch, _ = fragile_world()
    world.run()
    steps = switch.step
    assert steps > 60
    for kill_after in range(1, steps + 1):
        world, switch, telling = fragile_world()
        status = run_with_kills(world, switch, [kill_after], restart_clients=restart_clients)
        assert status is RunStatus.FINISHED
        assert_each_counted_once(world, telling)


@settings(max_examples=examples(25))
@given(kills=st.lists(st.integers(1, 60), max_size=6), restart_clients=st.booleans())
def test_a_server_killed_again_and_again_counts_each_upload_once(kills: list[int], restart_clients: bool) -> None:
    world, switch, telling = fragile_world()
    assert run_with_kills(world, switch, kills, restart_clients=restart_clients) is RunStatus.FINISHED
    assert_each_counted_once(world, telling)


class SmallDisk:
    """Takes so many writes below `folder`; then there is no space left until somebody frees some."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.writes = 0
        self.full_at: int | None = None
        write = os.write

        def counting(descriptor: int, data: memoryview) -> int:
            if Path(f"/proc/self/fd/{descriptor}").readlink().is_relative_to(self.folder):
                self.writes += 1
                if self.full_at is not None and self.writes >= self.full_at:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(descriptor, data)

        monkeypatch.setattr(os, "write", counting)


def world_on_disk(folder: Path) -> tuple[World, Telling]:
    telling = Telling()
    world = World(num_rounds=ROUNDS, algorithm=telling, delays=dict(DELAYS))
    return use_disk(world, folder), telling


def use_disk(world: World, folder: Path) -> World:
    """As a server process that has just been started: what it knows is what is on disk."""
    world.spool = FileSpool(folder / "spool")  # type: ignore[assignment]
    world.checkpoints = FileCheckpoints(folder / "checkpoints")  # type: ignore[assignment]
    return world


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/fd")
def test_a_server_whose_disk_is_full_at_any_one_write_says_so_and_goes_on_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SmallDisk(tmp_path / "whole", monkeypatch)
    world, telling = world_on_disk(disk.folder)
    world.run()
    assert_each_counted_once(world, telling)
    writes = disk.writes
    assert writes > 40
    for full_at in range(1, writes + 1):
        disk.folder, disk.writes, disk.full_at = tmp_path / f"full-at-{full_at}", 0, full_at
        world, telling = world_on_disk(disk.folder)
        with pytest.raises(RunError, match=r"cannot write '.*': No space left .* Free some space"):
            world.run()
        (ended,) = world.sink.of(RunEnded)
        assert ended.status is RunStatus.FAILED
        assert "Free some space" in ended.reason
        assert "Free some space" in (world.transport.closed or "")
        disk.full_at = None
        use_disk(world, disk.folder).restart()
        assert world.server().run() is RunStatus.FINISHED
        assert_each_counted_once(world, telling)
        assert not list(disk.folder.rglob("*.tmp")), "what could not be written is gone"
