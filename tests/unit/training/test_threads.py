"""The automatic number of threads: cores, not hyperthreads, and no more than the container may use."""

import os
from pathlib import Path

import pytest
import torch

from fedshelf.training.device import choose
from fedshelf.training.resources import default_threads


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages of four cores, each with two logical processors; the process may use all of them."""
    for number in range(16):
        topology = tmp_path / "cpus" / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{number // 8}\n")
        (topology / "core_id").write_text(f"{number % 8 // 2}\n")
    allow(monkeypatch, set(range(16)))
    return tmp_path


def allow(monkeypatch: pytest.MonkeyPatch, cpus: set[int]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cpus, raising=False)


def count(machine: Path, processes: int = 1) -> int:
    return default_threads(
        processes, cpus=machine / "cpus", groups=machine / "groups", own_group=machine / "own_group"
    )  # fmt: skip


def test_hyperthreads_are_not_counted(machine: Path) -> None:
    assert count(machine) == 8


def test_only_cores_that_the_process_may_run_on_are_counted(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, {0, 1, 2, 9})
    assert count(machine) == 3


def test_processes_share_the_cores_and_have_at_least_one_each(machine: Path) -> None:
    assert [count(machine, processes) for processes in (2, 3, 8, 100)] == [4, 2, 1, 1]


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ({"a/b/cpu.max": "250000 100000"}, 2),
        ({"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1),
        ({"cpu.max": "300000 100000", "a/b/cpu.max": "600000 100000"}, 3),
        ({"a/b/cpu.max": "50000 100000"}, 1),
        ({"a/b/cpu.max": "max 100000"}, 8),
        ({"other/cpu.max": "100000 100000"}, 8),
        ({"a/b/cpu.max": "nonsense"}, 8),
    ],
)
def test_a_quota_of_the_group_or_of_one_around_it_bounds_the_threads(
    machine: Path, quotas: dict[str, str], expected: int
) -> None:
    (machine / "own_group").write_text("0::/a/b\n")
    for name, text in quotas.items():
        path = machine / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert count(machine) == expected


@pytest.mark.parametrize(("quota", "expected"), [("400000", 4), ("-1", 8)])
def test_a_quota_of_the_older_kind_counts_too(machine: Path, quota: str, expected: int) -> None:
    (machine / "own_group").write_text("3:memory:/a\n4:cpu,cpuacct:/a\n")
    folder = machine / "groups" / "cpu,cpuacct" / "a"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert count(machine) == expected


def test_a_system_that_describes_nothing_still_gives_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert count(tmp_path) >= 1
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert count(tmp_path) >= 1


def test_no_number_of_threads_means_the_automatic_one() -> None:
    try:
        choose("cpu", threads=0)
        assert torch.get_num_threads() == default_threads()
    finally:
        torch.set_num_threads(1)
