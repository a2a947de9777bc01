"""A command is measured as a whole, and leaves nothing behind."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.measure import MeasurementError, Program, Sample, measure


def measured(command: Sequence[str], **settings: Any) -> Sample:
    return measure(Program(name="measured", command=command, **settings))


def is_gone(pid: int) -> bool:
    """Whether it has ended; its new parent may not have waited for it yet."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_measured_command_counts_its_child_processes() -> None:
    sample = measured(["tests.unit.benchmarks.burn_in_a_child"])
    assert sample.figures == {"burned": True}
    assert sample.processes == 2
    assert sample.cpu_seconds > 0.1  # burned by the child alone; the parent waits


def test_a_measured_command_that_fails_is_an_error() -> None:
    with pytest.raises(MeasurementError, match=r"no_such_module.* ended with exit code 1"):
        measured(["benchmarks.no_such_module"])


def test_what_a_command_leaves_running_is_ended() -> None:
    sample = measured(["tests.unit.benchmarks.leave_a_child"])
    assert sample.processes == 2
    assert is_gone(sample.figures["child"])


@pytest.mark.skipif(sys.platform != "linux", reason="orphans cannot be adopted here")
def test_a_child_whose_parent_ends_at_once_is_still_counted() -> None:
    sample = measured(["tests.unit.benchmarks.orphan_a_child"])
    assert sample.cpu_seconds > 0.3  # burned by the orphan alone
    assert is_gone(sample.figures["child"])


def test_a_command_that_takes_too_long_is_ended_and_is_an_error(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with pytest.raises(MeasurementError, match="did not finish in 2 s"):
        measured(["tests.unit.benchmarks.leave_a_child", str(note)], timeout=2.0)
    assert is_gone(int(note.read_text()))


def test_an_error_repeats_the_end_of_the_log(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match=r"No module named .*no_such_module.*errors.log"):
        measured(["benchmarks.no_such_module"], log=tmp_path / "errors.log")


def test_a_command_without_figures_is_an_error() -> None:
    with pytest.raises(MeasurementError, match="printed no figures"):
        measured(["this"])
