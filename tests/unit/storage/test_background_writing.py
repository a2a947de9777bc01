"""Writing beside the rounds: in order, all of it, and no error is lost."""

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fedshelf.core.errors import RunError
from fedshelf.core.events import ClientJoined, Event, RoundStarted, RunEnded, RunStatus
from fedshelf.core.messages import TaskKey
from fedshelf.core.state import ModelState, OpenRound, ServerState
from fedshelf.storage import background
from fedshelf.storage.background import BackgroundCheckpoints, BackgroundWriter
from fedshelf.storage.checkpoints import FileCheckpoints


class Disk:
    """Where events go: remembers them by transaction, waits and fails when told to."""

    def __init__(self) -> None:
        self.written: list[list[Event | str]] = []
        self.open = threading.Event()
        self.open.set()
        self.broken = False

    def write(self, events: Sequence[Event]) -> None:
        self.open.wait(timeout=60)
        if self.broken:
            raise RunError("the disk is full")
        self.written.append(list(events))

    def everything(self) -> list[Event | str]:
        return [event for events in self.written for event in events]


def joined(name: str) -> ClientJoined:
    return ClientJoined(client=name, num_train=1, num_validation=0, num_left_out=0)


def test_everything_is_written_in_the_order_in_which_it_was_asked_for() -> None:
    disk = Disk()
    wanted: list[Event | str] = []
    with BackgroundWriter(disk.write) as writer:
        for number in range(50):
            events = [joined(f"{number}-{i}") for i in range(3)]
            for event in events:
                writer.emit(event)
            writer.do(lambda number=number: disk.written.append([f"job {number}"]))  # type: ignore[misc]
            wanted += [*events, f"job {number}"]
    assert disk.everything() == wanted


def test_events_of_many_clients_are_one_transaction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "LINGER", 60.0)
    disk = Disk()
    with BackgroundWriter(disk.write) as writer:
        for number in range(100):
            writer.emit(joined(str(number)))
        writer.emit(RoundStarted(round=1, attempt=0, cohort=()))
        writer.wait()
        assert len(disk.everything()) == 101
        assert len(disk.written) <= 2


def test_events_of_clients_do_not_wait_for_the_end_of_a_round() -> None:
    disk = Disk()
    with BackgroundWriter(disk.write) as writer:
        writer.emit(joined("a"))
        deadline = threading.Event()
        for _ in range(600):
            if disk.written:
                break
            deadline.wait(0.1)
        assert disk.everything() == [joined("a")]


def test_an_error_is_raised_by_the_next_call_and_nothing_is_written_after_it() -> None:
    disk = Disk()
    disk.open.clear()
    disk.broken = True
    writer = BackgroundWriter(disk.write)
    writer.emit(RoundStarted(round=1, attempt=0, cohort=()))
    number = writer.do(lambda: disk.written.append(["a checkpoint without its record"]))
    disk.open.set()
    with pytest.raises(RunError, match="the disk is full"):
        writer.wait(number)
    with pytest.raises(RunError, match="the disk is full"):
        writer.emit(joined("a"))
    with pytest.raises(RunError, match="the disk is full"):
        writer.close()
    assert disk.written == []


def finish(disk: Disk, failure: Exception | None = None) -> None:
    """A run whose last event cannot be written, and that may have failed before."""
    with BackgroundWriter(disk.write) as writer:
        disk.broken = True
        writer.emit(RunEnded(status=RunStatus.FINISHED))
        if failure is not None:
            raise failure


def test_an_error_of_the_last_event_is_not_lost() -> None:
    with pytest.raises(RunError, match="the disk is full"):
        finish(Disk())


def test_the_first_failure_is_the_one_that_is_heard_of() -> None:
    with pytest.raises(ValueError, match="the round failed"):
        finish(Disk(), ValueError("the round failed"))


def state(round: int) -> ServerState:
    return ServerState(round=round, model=ModelState(params=torch.full((10,), float(round))))


def test_checkpoints_that_are_written_beside_the_rounds_are_those_that_were_saved(tmp_path: Path) -> None:
    opened = OpenRound(key=TaskKey(run_id="r", round=4, attempt=0), cohort=("a",), live=("a", "b"))
    with BackgroundWriter(Disk().write) as writer:
        checkpoints = BackgroundCheckpoints(FileCheckpoints(tmp_path), writer)
        assert checkpoints.load() is None
        for number in (1, 2, 3):
            checkpoints.save(state(number), is_best=False)
        checkpoints.save_open_round(opened)
        loaded = checkpoints.load()
        assert loaded is not None
        assert torch.equal(loaded.model.params, state(3).model.params)
        assert checkpoints.load_open_round() == opened
    assert FileCheckpoints(tmp_path).load_open_round() == opened


def test_a_slow_disk_slows_the_rounds_down_and_does_not_fill_the_memory(tmp_path: Path) -> None:
    """One state may wait to be written; the next is taken once that is done."""
    disk = Disk()
    disk.open.clear()
    saved: list[int] = []

    def rounds(checkpoints: BackgroundCheckpoints) -> None:
        for number in (1, 2, 3):
            checkpoints.save(state(number), is_best=False)
            saved.append(number)

    with BackgroundWriter(disk.write) as writer:
        writer.emit(RoundStarted(round=1, attempt=0, cohort=()))
        thread = threading.Thread(target=rounds, args=(BackgroundCheckpoints(FileCheckpoints(tmp_path), writer),))
        thread.start()
        thread.join(timeout=0.5)
        assert saved == [1]
        disk.open.set()
        thread.join(timeout=60)
        assert saved == [1, 2, 3]
