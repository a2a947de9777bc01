"""A run's folder: identity, lock, differences, and which one to go on with."""

import datetime
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from fedshelf.core.errors import RunError, UsageError
from fedshelf.core.events import RunEnded, RunStarted, RunStatus
from fedshelf.storage.run_directory import RunDirectory, differences, new_run_id
from fedshelf.tracking.database import RunDatabase
from fedshelf.tracking.runs import find_resumable, find_runs, resolve_run

HOLD_LOCK = """
import sys, time
from pathlib import Path
from fedshelf.storage.run_directory import RunDirectory
lock = RunDirectory.open(Path(sys.argv[1])).lock()
print("locked", flush=True)
time.sleep(600)
"""


def create(path: Path, run_id: str = "20261121-083512-a1b2", digest: str = "d1") -> RunDirectory:
    return RunDirectory.create(path, run_id=run_id, config_toml="rounds = 3\n", config_digest=digest)


def is_d1(run: RunDirectory) -> bool:
    return run.config_digest == "d1"


def end(run: RunDirectory, status: RunStatus) -> None:
    database = RunDatabase(run.database)
    database.emit(
        RunStarted(run_id=run.run_id, num_rounds=3, first_round=1, num_parameters=9, num_classes=2, min_clients=1)
    )
    database.emit(RunEnded(status=status))
    database.close()


def lock_in_another_process(run: RunDirectory) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def wait_for_ever(alive: "Event") -> None:
    alive.set()
    signal.pause()


def kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def test_run_ids_sort_by_time_and_differ() -> None:
    early = datetime.datetime(2026, 11, 21, 8, 35, 12, tzinfo=datetime.UTC)
    ids = [new_run_id(early + datetime.timedelta(seconds=s)) for s in range(100)]
    assert ids == sorted(ids)
    assert ids[0].startswith("20261121-083512-")
    assert len({new_run_id(early) for _ in range(50)}) > 1


def test_an_opened_run_is_the_one_that_was_created(tmp_path: Path) -> None:
    created = create(tmp_path / "run")
    assert RunDirectory.open(tmp_path / "run") == created
    assert created.config_toml == "rounds = 3\n"


def test_a_second_run_does_not_overwrite_the_first(tmp_path: Path) -> None:
    create(tmp_path)
    with pytest.raises(RunError, match="already holds run 20261121-083512-a1b2"):
        create(tmp_path, run_id="other")


def test_a_folder_of_other_things_is_not_made_a_run(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(RunError, match="there is 'photos' in it"):
        create(tmp_path)


def test_creation_that_was_killed_halfway_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("rounds = 1\n")
    assert create(tmp_path).config_toml == "rounds = 3\n"


def test_a_folder_without_a_run_and_a_damaged_or_newer_identity_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run"):
        RunDirectory.open(tmp_path)
    create(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"is damaged: it is not JSON \(line 1, column 2\)\. Restore it"):
        RunDirectory.open(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(RunError, match="newer FedShelf"):
        RunDirectory.open(tmp_path)


def test_a_changed_configuration_keeps_the_runs_identity(tmp_path: Path) -> None:
    extended = create(tmp_path).replace_config("rounds = 5\n", "d2")
    assert RunDirectory.open(tmp_path) == extended
    assert (extended.run_id, extended.config_digest) == ("20261121-083512-a1b2", "d2")
    assert extended.config_toml == "rounds = 5\n"


def test_a_second_process_is_refused_and_told_who_runs_the_run(tmp_path: Path) -> None:
    run = create(tmp_path)
    process = lock_in_another_process(run)
    try:
        with pytest.raises(RunError, match=f"process {process.pid}"):
            run.lock()
        assert run.owner() == process.pid
    finally:
        kill(process)


def test_the_lock_of_a_killed_process_is_no_obstacle(tmp_path: Path) -> None:
    run = create(tmp_path)
    kill(lock_in_another_process(run))
    assert (tmp_path / "lock").read_text().strip().isdigit()  # its file is still there
    assert run.owner() is None
    with run.lock():
        assert run.owner() == os.getpid()
    assert run.owner() is None


def test_looking_at_a_run_neither_takes_nor_drops_its_lock(tmp_path: Path) -> None:
    run = create(tmp_path)
    with run.lock():
        for _ in range(3):
            assert run.owner() == os.getpid()
        with pytest.raises(RunError, match="is in use by process"):
            run.lock()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_worker_does_not_keep_a_dead_run_alive(tmp_path: Path) -> None:
    run = create(tmp_path)
    lock = run.lock()
    fork = multiprocessing.get_context("fork")
    alive = fork.Event()
    worker = fork.Process(target=wait_for_ever, args=(alive,))
    worker.start()
    try:
        assert alive.wait(60)
        assert run.owner() == os.getpid()
        lock.release()  # as the kernel would at this process' death
        assert run.owner() is None
    finally:
        worker.kill()
        worker.join()


def test_differences_name_every_key_that_differs_and_no_other() -> None:
    old = 'seed = 1\nflag = true\n[training]\nlr = 0.1\nmodel = "a"\n'
    new = 'seed = 1\nflag = 1\n[training]\nlr = 0.2\nmodel = "a"\nmu = 0.01\n'
    assert [str(d) for d in differences(old, new)] == [
        "flag: True → 1",
        "training.lr: 0.1 → 0.2",
        "training.mu: not set → 0.01",
    ]
    assert differences(old, old) == ()


def test_the_newest_unfinished_run_of_the_same_configuration_goes_on(tmp_path: Path) -> None:
    assert find_resumable(tmp_path / "missing", is_d1) is None
    finished, stopped, newest, other = (create(tmp_path / name, name) for name in ("a", "b", "c", "d"))
    end(finished, RunStatus.FINISHED)
    end(stopped, RunStatus.STOPPED)
    end(newest, RunStatus.FAILED)
    other.replace_config("rounds = 9\n", "d2")
    assert find_resumable(tmp_path, is_d1) == newest
    end(newest, RunStatus.FINISHED)
    assert find_resumable(tmp_path, is_d1) == stopped
    end(stopped, RunStatus.FINISHED)
    assert find_resumable(tmp_path, is_d1) is None
    assert find_resumable(tmp_path, lambda run: run.config_digest == "d2") == RunDirectory.open(other.path)


def test_a_run_that_never_started_a_round_goes_on_too(tmp_path: Path) -> None:
    assert find_resumable(tmp_path, is_d1) is None
    run = create(tmp_path / "a")
    assert find_resumable(tmp_path, is_d1) == run


def test_runs_are_found_by_folder_id_and_beginning_of_the_id(tmp_path: Path) -> None:
    first = create(tmp_path / "20261121-083512-a1b2", "20261121-083512-a1b2")
    second = create(tmp_path / "20261121-091200-c3d4", "20261121-091200-c3d4")
    (tmp_path / "unrelated").mkdir()
    assert find_runs(tmp_path) == (first, second)
    assert resolve_run("20261121-083512-a1b2", tmp_path) == first
    assert resolve_run("20261121-09", tmp_path) == second
    assert resolve_run(str(first.path), tmp_path / "elsewhere") == first
    with pytest.raises(UsageError, match="matches 2 runs: '20261121-083512-a1b2', '20261121-091200-c3d4'"):
        resolve_run("2026", tmp_path)
    with pytest.raises(UsageError, match=r"unknown run 'x' in .*: the newest is 20261121-091200-c3d4\."):
        resolve_run("x", tmp_path)
    with pytest.raises(UsageError, match=r"unknown run '20261121-0836' in .*: did you mean '20261121-083512-a1b2'\?"):
        resolve_run("20261121-0836", tmp_path)
    with pytest.raises(UsageError, match="unknown run 'x': there are no runs in"):
        resolve_run("x", tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="RUN is empty: give a run's folder, its id"):
        resolve_run("", tmp_path)
    with pytest.raises(RunError, match="holds no run"):
        resolve_run(str(tmp_path / "unrelated"), tmp_path)


def test_one_damaged_run_does_not_hide_the_others(tmp_path: Path) -> None:
    whole, damaged = create(tmp_path / "a", "a"), create(tmp_path / "b", "b")
    (damaged.path / "run.json").write_text("")
    assert find_runs(tmp_path) == (whole,)


def test_the_run_to_go_on_with_may_be_running_already_and_then_says_so(tmp_path: Path) -> None:
    create(tmp_path / "a", "a")
    newest = create(tmp_path / "b", "b")
    with newest.lock():
        found = find_resumable(tmp_path, is_d1)
        assert found == newest
        with pytest.raises(RunError, match="is in use by process"):
            found.lock()


def test_the_process_that_runs_a_run_is_found(tmp_path: Path) -> None:
    run = create(tmp_path)
    assert run.process() is None
    holding = lock_in_another_process(run)
    try:
        found = run.process()
        assert found is not None
        assert found.pid == holding.pid
    finally:
        kill(holding)
    assert run.process() is None, "what its lock's file says is no longer true"


@pytest.mark.parametrize("says", ["another process", "nobody's number"])
def test_a_process_that_does_not_hold_the_lock_is_not_taken_for_the_one_that_does(tmp_path: Path, says: str) -> None:
    run = create(tmp_path)
    holding = lock_in_another_process(run)
    try:
        pid = os.getpid() if says == "another process" else 2**22 + 1  # above what Linux gives
        (tmp_path / "lock").write_text(f"{pid}\n")
        with pytest.raises(RunError, match=f"is locked by process {pid}, which cannot be seen here"):
            run.process()
    finally:
        kill(holding)


def test_a_run_that_never_began_is_removed_and_the_users_own_files_stay(tmp_path: Path) -> None:
    (tmp_path / ".note").touch()
    run = create(tmp_path)
    run.spool.mkdir()
    run.remove()
    assert [path.name for path in tmp_path.iterdir()] == [".note"]
    create(tmp_path / "run").remove()
    assert not (tmp_path / "run").exists()
