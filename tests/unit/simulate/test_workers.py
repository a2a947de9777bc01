"""Worker processes: who gets which work, and how it all ends."""

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from fedshelf.core.child_process import STOP_SIGNALS
from fedshelf.core.errors import FedShelfError, WorkerLostError
from fedshelf.core.messages import Broadcast, ClientMessage, Evaluation, Purpose, Ready, ServerMessage, Setup, TaskKey
from fedshelf.simulate import workers
from fedshelf.simulate.ipc import pack
from fedshelf.simulate.processes import start_method
from fedshelf.simulate.shared import SharedFiles, SharedFolders
from fedshelf.simulate.workers import WorkerPool, _RunOne, _work
from fedshelf.storage.checkpoints import FileCheckpoints
from tests.unit.simulate import stateful

SETUP = Setup(run_id="r", config="", catalogue="", layout_digest="")
KEY = TaskKey(run_id="r", round=1, attempt=0)


@dataclass
class Counting:
    """A player whose answer tells which process played, and as its how manieth task."""

    sizes: dict[str, int]
    device: Any = "cpu"
    states: Path | None = None
    models: Path | None = None
    played: int = field(default=0)

    def prepare(self, setup: Setup) -> None: ...

    def open(self, setup: Setup) -> None: ...

    def ready(self, name: str, setup: Setup) -> Ready:
        return Ready(
            run_id="r", layout_digest="", catalogue_digest="", config_digest="", num_train=self.sizes[name],
            num_validation=0, num_left_out=0,
        )  # fmt: skip

    def run(self, name: str, message: ServerMessage) -> ClientMessage:
        if name == "broken":
            raise ValueError("this client is broken")
        if name == "deadly":
            os._exit(3)
        if name == "crashing":
            faulthandler.disable()  # pytest's: this crash is meant
            os.kill(os.getpid(), signal.SIGSEGV)
        if name == "hung" and not Path("hung").exists():
            Path("hung").touch()
            locked = threading.Lock()
            locked.acquire()
            locked.acquire()
        if name == "always-hung":
            time.sleep(600)
        if name == "endless":
            print("at work", flush=True)
            time.sleep(600)
        self.played += 1
        assert isinstance(message, Broadcast)
        return Evaluation(
            key=message.key, num_examples=os.getpid(), num_correct=self.played, loss_sum=message.params.sum().item()
        )


def broadcast(value: float = 1.0) -> Broadcast:
    return Broadcast(key=KEY, purpose=Purpose.TRAIN, vectors={"params": torch.full((5_000,), value)}, client_lr=0.1)


def answers(pool: WorkerPool) -> dict[str, Evaluation]:
    found: dict[str, Evaluation] = {}
    while (answer := pool.next()) is not None:
        assert isinstance(answer[1], Evaluation)
        found[answer[0]] = answer[1]
    return found


def train(pool: WorkerPool, name: str) -> None:
    pool.submit(name, broadcast())
    pool.next()


def ask_to_stop(others: list[psutil.Process]) -> None:
    """Send all children of this process but `others` what a terminal and a service manager send to all processes."""
    for child in psutil.Process().children():
        if child not in others and "resource_tracker" not in " ".join(child.cmdline()):
            for number in STOP_SIGNALS:
                child.send_signal(number)


def pool_of(sizes: dict[str, int], workers: int) -> WorkerPool:
    pool = WorkerPool(Counting(sizes), workers, threads=1)  # type: ignore[arg-type]
    for name in sizes:
        pool.submit(name, SETUP)
    assert [pool.next() is not None for _ in sizes] == [True] * len(sizes)
    return pool


def test_the_longest_work_is_done_first() -> None:
    sizes = {"a": 1, "b": 2, "c": 3, "d": 9, "e": 4, "f": 2}
    with pool_of(sizes, 1) as pool:
        for name in sizes:
            pool.submit(name, broadcast())
        order = {name: answer.num_correct for name, answer in answers(pool).items()}
    assert order["a"] == 1  # it was there before the others were known
    assert order["d"] < order["e"] < order["f"]


def test_every_worker_has_its_share() -> None:
    names = {f"{i:02d}": 1 for i in range(20)}
    with pool_of(names, 2) as pool:
        for name in names:
            pool.submit(name, broadcast())
        processes = {answer.num_examples for answer in answers(pool).values()}
    assert len(processes) == 2
    assert os.getpid() not in processes


def test_each_task_reads_the_model_that_it_was_given() -> None:
    """Files of models that nobody holds any more are used again, but not while a task waits for its own."""
    names = {f"{i:02d}": 1 for i in range(30)}
    with pool_of(names, 2) as pool:
        for i, name in enumerate(names):
            pool.submit(name, broadcast(float(i)))
        found = answers(pool)
    assert {name: answer.loss_sum for name, answer in found.items()} == {
        name: 5_000.0 * i for i, name in enumerate(names)
    }


def test_a_worker_that_fails_says_why_and_no_process_stays_behind() -> None:
    before = psutil.Process().children()
    with pool_of({"broken": 1}, 2) as pool:
        processes = [process for process in psutil.Process().children() if process not in before]
        pool.submit("broken", broadcast())
        with pytest.raises(FedShelfError, match="this client is broken"):
            pool.next()
    assert len(processes) == 2
    assert not any(process.is_running() for process in processes)


def test_a_worker_that_is_killed_is_one_clear_error() -> None:
    before = psutil.Process().children()
    with pool_of({"a": 1}, 1) as pool:
        (worker,) = (process for process in psutil.Process().children() if process not in before)
        pool.submit("a", broadcast())
        assert pool.next() is not None
        worker.send_signal(signal.SIGKILL)
        while worker.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.001)
        with pytest.raises(FedShelfError, match=r"^the process of a was ended by SIGKILL \(out of memory\?\); start"):
            train(pool, "a")  # its last thread may hold the pipe for a moment more


def test_a_worker_that_dies_at_work_is_one_clear_error() -> None:
    with pool_of({"deadly": 1}, 1) as pool:
        pool.submit("deadly", broadcast())
        with pytest.raises(FedShelfError, match=r"^the process of deadly ended with exit code 3; start"):
            pool.next()


def test_a_worker_that_hangs_says_where_and_another_does_its_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workers, "HUNG_SECONDS", 1.0)
    with pool_of({"a": 1, "hung": 2, "b": 3}, 2) as pool:
        for name in ("hung", "a", "b"):
            pool.submit(name, broadcast())
        assert {answer.loss_sum for answer in answers(pool).values()} == {5_000.0}
        pool.submit("hung", broadcast(2.0))
        assert answers(pool)["hung"].loss_sum == 10_000.0
    assert "the process of hung has computed nothing for 1 s" in caplog.text
    assert "test_workers.py" in capfd.readouterr().err, "the stack of the process that hung"


def test_workers_that_hang_again_and_again_end_the_run_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "HUNG_SECONDS", 0.5)
    monkeypatch.setattr(workers, "MOST_REPLACED", 1)
    with (
        pool_of({"always-hung": 1}, 1) as pool,
        pytest.raises(WorkerLostError, match=r"always-hung has computed nothing for 0\.5 s, like 1 process before it"),
    ):
        train(pool, "always-hung")


def test_a_worker_that_is_stopped_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "HUNG_SECONDS", 0.5)
    before = psutil.Process().children()
    with pool_of({"a": 1}, 1) as pool:
        [worker] = [child for child in psutil.Process().children() if child not in before]
        worker.suspend()
        pool.submit("a", broadcast())
        threading.Timer(2.0, worker.resume).start()
        assert answers(pool)["a"].num_examples == worker.pid


def test_a_worker_that_crashes_is_named_by_its_client_and_the_signal() -> None:
    with pool_of({"crashing": 1}, 1) as pool:
        pool.submit("crashing", broadcast())
        with pytest.raises(FedShelfError, match=r"^the process of crashing was ended by SIGSEGV \(a fault in native"):
            pool.next()


def test_workers_leave_it_to_their_parent_when_a_service_manager_stops_all_processes() -> None:
    before = psutil.Process().children()
    with pool_of({"a": 1, "b": 1}, 2) as pool:
        ask_to_stop(before)
        for name in ("a", "b"):
            pool.submit(name, broadcast())
        assert set(answers(pool)) == {"a", "b"}


def test_a_worker_amid_a_task_ends_with_its_parent() -> None:
    code = (
        "import os, psutil\nfrom tests.unit.simulate.test_workers import *\n"
        "pool = WorkerPool(Counting({'endless': 1}), 1, threads=1)\n"
        "print(*(child.pid for child in psutil.Process().children()), flush=True)\n"
        "pool.submit('endless', broadcast())\npool.next()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        (worker,) = (psutil.Process(int(pid)) for pid in parent.stdout.readline().split())
        assert parent.stdout.readline() == "at work\n"
        parent.kill()
        while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)


def test_a_worker_whose_parent_dies_meanwhile_ends_in_silence() -> None:
    ours, theirs = Pipe()

    class Orphaned(Counting):
        def run(self, name: str, message: ServerMessage) -> ClientMessage:
            ours.close()
            return super().run(name, message)

    with contextlib.closing(SharedFolders()) as folders:
        files = SharedFiles(folders.paths, "models")
        ours.send_bytes(pack(([], _RunOne(name="a", message=broadcast())), files.publish))
        _work(Orphaned({"a": 1}), folders.paths, theirs, 0)  # type: ignore[arg-type]
    theirs.close()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux is told whom to kill first")
def test_where_memory_runs_out_workers_die_before_their_parent() -> None:
    own = int(Path("/proc/self/oom_score_adj").read_text())
    before = psutil.Process().children()
    with pool_of({"a": 1}, 1) as pool:
        (worker,) = (process for process in psutil.Process().children() if process not in before)
        pool.submit("a", broadcast())
        assert pool.next() is not None
        assert int(Path(f"/proc/{worker.pid}/oom_score_adj").read_text()) == min(1000, own + 500)


def test_workers_that_compute_with_several_threads_are_not_forked() -> None:
    assert start_method("cpu", threads=2) == "spawn"
    assert start_method("cuda", threads=1) == "spawn"


@pytest.mark.slow
def test_workers_that_are_not_forked_work_alike() -> None:
    names = {f"{i:02d}": 1 for i in range(4)}
    before = psutil.Process().children()
    pool = WorkerPool(Counting(names), 2, threads=2)  # type: ignore[arg-type]
    with pool:
        ask_to_stop(before)  # workers that have hardly begun
        for i, name in enumerate(names):
            pool.submit(name, broadcast(float(i)))
        found = answers(pool)
    assert [answer.loss_sum for _, answer in sorted(found.items())] == [0.0, 5_000.0, 10_000.0, 15_000.0]


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_workers_that_are_not_forked_come_to_the_same_bits() -> None:
    """They have the photos from shared memory, where forked ones have them as they are."""
    threads = torch.get_num_threads()
    try:
        finals = []
        for workers in (0, 2):
            _, directory = stateful.simulate(Path(f"w{workers}"), workers=workers, threads=2)
            state = FileCheckpoints(directory.checkpoints).load()
            assert state is not None
            finals.append(state.model.params)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*finals)
