"""Machines that differ, simulated: who does how much, who is late, and how long a round takes in virtual time."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedshelf.core.errors import UsageError
from fedshelf.core.events import ClientStatus, RoundFinished
from fedshelf.simulate.engine import simulate
from fedshelf.storage.checkpoints import FileCheckpoints
from tests.fakes import RecordingSink
from tests.unit.simulate.test_simulation import config, final, stores

__all__ = ["stores"]  # a fixture


def run(name: str, **values: Any) -> tuple[torch.Tensor, list[RoundFinished]]:
    """A run of three rounds with three stores, of which rome has the slow machine."""
    sink = RecordingSink()
    given: dict[str, Any] = {"slowdowns": "1,1,50", "rounds": 3, "norm": "group", "width": 8, "run_dir": Path(name)}
    _, directory = simulate(config(**{**given, **values}), watchers=(sink,))
    return final(directory), sink.of(RoundFinished)


def members(record: RoundFinished, field: str) -> dict[str, Any]:
    return {member.client: getattr(member, field) for member in record.clients}


def seconds(records: list[RoundFinished]) -> list[float]:
    return [record.virtual_seconds or 0.0 for record in records]


def test_once_speeds_are_known_work_is_dealt_by_them_and_rounds_are_shorter(stores: Path) -> None:
    _, fixed = run("fixed")
    _, dynamic = run("dynamic", local_work="dynamic", least_work=0.1)
    first, *later = dynamic
    assert members(first, "num_steps") == members(fixed[0], "num_steps")
    for record in later:
        steps, configured = members(record, "num_steps"), members(first, "num_steps")
        assert steps["rome"] < configured["rome"]
        assert steps["lyon"] > configured["lyon"]
    assert seconds(dynamic)[0] == pytest.approx(seconds(fixed)[0])
    assert max(seconds(dynamic)[1:]) < 0.5 * seconds(fixed)[1]


def test_machines_that_are_alike_in_all_do_what_they_would_with_fixed_epochs(stores: Path) -> None:
    values = {
        "data_dir": stores,
        "val_fraction": 0.0,
        "batch_size": 64,
    }  # one step an epoch, whoever has how many photos
    slowdowns = "15,7,9.5454545454545"  # 7, 15 and 11 photos: all take as long
    fixed, _ = run("fixed", slowdowns=slowdowns, **values)
    dynamic, _ = run("dynamic", slowdowns=slowdowns, local_work="dynamic", **values)
    assert torch.equal(fixed, dynamic)


@pytest.mark.slow
def test_who_computes_changes_nothing_of_work_dealt_by_speed(stores: Path) -> None:
    values = {"local_work": "dynamic", "straggler_factor": 3.0}
    alone, records = run("alone", **values)
    shared, shared_records = run("shared", workers=2, **values)
    assert torch.equal(alone, shared)
    assert seconds(records) == seconds(shared_records)


def test_who_is_slower_than_the_factor_allows_is_late_in_virtual_time(stores: Path) -> None:
    _, (first, *later) = run("late", straggler_factor=2.0, quorum=2)
    assert set(members(first, "status").values()) == {ClientStatus.COUNTED}
    for record in later:
        assert members(record, "status")["rome"] is ClientStatus.LATE
        assert "--straggler-factor" in members(record, "reason")["rome"]
        assert record.virtual_seconds == pytest.approx(1.0), "the shortest deadline"


def test_the_first_to_answer_in_virtual_time_are_the_ones_that_count(stores: Path) -> None:
    _, records = run("first", slowdowns="50,1,1", fraction=0.6, over_selection=0.5)
    for record in records:
        assert members(record, "status") == {
            "lyon": ClientStatus.LATE, "oslo": ClientStatus.COUNTED, "rome": ClientStatus.COUNTED,
        }  # fmt: skip
        assert "--over-selection" in members(record, "reason")["lyon"]


def test_paces_are_kept_with_the_run(stores: Path) -> None:
    run("kept", local_work="dynamic")
    state = FileCheckpoints(Path("kept") / "checkpoints").load()
    assert state is not None
    assert state.pace["rome"] > 10 * state.pace["lyon"] > 0


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("--straggler-factor", {"straggler_factor": 2.0}),
        ("--over-selection", {"over_selection": 0.5}),
        ("--local-work", {"local_work": "cut"}),
    ],
)
def test_asynchronous_rounds_wait_for_nobody_anyway(stores: Path, key: str, values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{key} with --algorithm fedbuff"):
        run("refused", algorithm="fedbuff", **values)
    assert not Path("refused").exists()
