"""Finds runs: by name, or the one to resume."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedshelf.core.errors import RunError, UsageError
from fedshelf.core.events import RunStatus
from fedshelf.core.text import counted, did_you_mean, some
from fedshelf.storage.atomic_files import translating_os_errors
from fedshelf.storage.run_directory import RunDirectory, is_run
from fedshelf.tracking.queries import RunSummary, run_summary

logger = logging.getLogger(__name__)


def find_runs(root: Path) -> tuple[RunDirectory, ...]:
    """Return all runs directly below `root`, oldest first; empty if there is no such folder.

    A folder that cannot be read, or whose identity cannot, is skipped with a warning.

    Raises:
        RunError: `root` cannot be read.
    """
    with translating_os_errors("read", root):
        paths = sorted(root.iterdir()) if root.is_dir() else []
    found = []
    for path in paths:
        with _skipping(path):
            if is_run(path):
                found.append(RunDirectory.open(path))
    return tuple(sorted(found, key=lambda run: (run.created, run.run_id)))


def summaries_of(runs: Iterable[RunDirectory]) -> list[tuple[RunDirectory, RunSummary]]:
    """Return the runs whose database can be read, with their summaries; each other one is skipped with a warning."""
    found = []
    for run in runs:
        with _skipping(run.path):
            found.append((run, run_summary(run.path)))
    return found


@contextmanager
def _skipping(path: Path) -> Iterator[None]:
    """Turn an error into a warning: one damaged folder must not hide the other runs."""
    try:
        yield
    except RunError as error:
        logger.warning("skipping '%s': %s", path, error)


def find_resumable(root: Path, is_same: Callable[[RunDirectory], bool]) -> RunDirectory | None:
    """Return the newest unfinished run with the same configuration, or None.

    The run may be active; taking its lock then fails with an explanation. Skipping it would start a second run, which
    the next restart would resume instead of the first. A run whose database cannot be read is skipped with a warning.

    Args:
        root: the folder of all runs.
        is_same: whether a run has that configuration.

    Raises:
        RunError: `root` cannot be read.
    """
    alike = summaries_of(run for run in reversed(find_runs(root)) if is_same(run))
    return next((run for run, summary in alike if summary.status is not RunStatus.FINISHED), None)


def resolve_run(name: str, root: Path) -> RunDirectory:
    """Find a run by its folder, its id, or a prefix of its id.

    Args:
        name: the user's input.
        root: the folder of all runs.

    Returns:
        The run's directory.

    Raises:
        UsageError: `name` is empty, there is no such run, or several match.
        RunError: `name` is a folder without a run.
    """
    if not name:
        raise UsageError("RUN is empty: give a run's folder, its id, or the beginning of its id")
    runs = find_runs(root)
    for run in runs:
        if name in (run.run_id, run.path.name):
            return run
    path = Path(name)
    if path.is_dir() or is_run(path):  # is_run explains a folder that cannot be read
        return RunDirectory.open(path)
    matching = [run for run in runs if run.run_id.startswith(name)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise UsageError(f"'{name}' matches {counted(len(matching), 'run')}: {some(r.run_id for r in matching)}")
    if not runs:
        raise UsageError(f"unknown run '{name}': there are no runs in '{root}'")
    hint = did_you_mean(name, (run.run_id for run in runs)) or f": the newest is {runs[-1].run_id}."
    raise UsageError(f"unknown run '{name}' in '{root}'{hint} 'fedshelf runs list' shows all")
