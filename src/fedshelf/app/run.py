"""Opens a run on disk, new or resumed."""

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from fedshelf.app.components import optional_components
from fedshelf.app.model import ModuleFactory
from fedshelf.app.run_validation import check_run
from fedshelf.app.teacher import with_teacher
from fedshelf.config import files, places
from fedshelf.config.schema import RunConfig, recommended
from fedshelf.core.errors import FedShelfError, ModelError, RunError, UsageError
from fedshelf.core.events import Event, RunStarted, RunStatus
from fedshelf.core.ports import MetricSink
from fedshelf.core.text import counted
from fedshelf.models.own_model import find_source, use_model_path
from fedshelf.models.registry import is_own
from fedshelf.storage.background import BackgroundWriter
from fedshelf.storage.run_directory import Difference, RunDirectory, differences, is_run, new_run_id
from fedshelf.tracking.database import RunDatabase
from fedshelf.tracking.queries import LOST, run_summary
from fedshelf.tracking.registry import SINKS
from fedshelf.tracking.runs import find_resumable
from fedshelf.tracking.sinks import Sinks

logger = logging.getLogger(__name__)

MOST_CHANGES = 8  # differences from a run's settings that are named


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedRun:
    """A run directory locked by this process.

    Attributes:
        config: the run's configuration.
        directory: the run's directory.
        sink: receives the run's events.
        writer: writes files in the background, if enabled.
    """

    config: RunConfig
    directory: RunDirectory
    sink: MetricSink
    writer: BackgroundWriter | None = None


class _HasBegun:
    """A sink that records whether the run's rounds have begun."""

    has_begun = False

    def emit(self, event: Event) -> None:
        """See `MetricSink`."""
        self.has_begun = self.has_begun or isinstance(event, RunStarted)


def with_own_model(config: RunConfig, make_module: ModuleFactory | None = None) -> RunConfig:
    """Return `config` with the digest of a model's own source, after making `--model-path` known to this process.

    Args:
        config: the run's configuration.
        make_module: creates the caller's own model, whose source is not recorded.

    Returns:
        The configuration.

    Raises:
        UsageError: there is no such folder or module, or `config` asks for another digest.
    """
    use_model_path(config.model_path)
    try:
        digest = None if make_module or not is_own(config.model) else find_source(config.model).digest
    except ModelError as error:
        raise UsageError(str(error)) from None
    if config.model_digest not in (None, digest):
        raise UsageError(
            f"model-digest = {config.model_digest!r}: that of --model {config.model} is {digest!r}. Use the source "
            "with the former, or remove the key"
        )
    return config.model_copy(update={"model_digest": digest})


@contextmanager
def open_run(
    config: RunConfig, *, watchers: tuple[MetricSink, ...], in_background: bool = False,
    make_module: ModuleFactory | None = None,
) -> Iterator[OpenedRun]:  # fmt: skip
    """Open the run for `config`, as a context manager.

    It is the run in `config.run_dir`, or else the newest unfinished one below `runs/` with the same configuration, or
    else a new one. A new run that fails before its first round is removed.

    Args:
        config: the run's configuration.
        watchers: sinks in addition to the run's database and those of `SINKS` that it has set.
        in_background: write files in a separate thread; not for a server whose clients outlive it.
        make_module: creates the caller's own model, if there is one.

    Yields:
        The run.

    Raises:
        RunError: the directory has different settings (listed), another process runs it, or it cannot be written to.
        UsageError: there is no run to extend, or settings are invalid (all are listed).
    """
    config = with_teacher(with_own_model(config, make_module))
    existing = _existing_run(config)
    check_run(config, make_module, existing)
    if existing is not None:
        _check_whole(existing)
    elif config.pretrained and (chosen := recommended(config.model_dump())):
        flags = ", ".join(f"{name.replace('_', '-')} = {getattr(config, name)}" for name in chosen)
        logger.info("--pretrained: settings for fine-tuning, where none were given: %s", flags)
    directory = existing or _new_run(config)
    began, optional = _HasBegun(), (*watchers, *optional_components(config, SINKS))
    with directory.lock():
        try:
            with closing(RunDatabase(directory.database)) as database, _recording_failure(database):
                if not in_background:
                    sink = Sinks(required=(database, began), optional=optional)
                    yield OpenedRun(config=config, directory=directory, sink=sink)
                    return
                with BackgroundWriter(database.emit_all) as writer:
                    sink = Sinks(required=(writer, began), optional=optional)
                    yield OpenedRun(config=config, directory=directory, sink=sink, writer=writer)
        except BaseException:
            if existing is None and not began.has_begun:
                directory.remove()
            raise


@contextmanager
def _recording_failure(database: RunDatabase) -> Iterator[None]:
    """Record why a run fails, also where the server could not: its disk was full while it wrote something larger."""
    try:
        yield
    except FedShelfError as error:
        with suppress(RunError):
            database.record_failure(str(error))
        raise


def _existing_run(config: RunConfig) -> RunDirectory | None:
    """Return the directory of the run to resume, or None if there is none."""
    toml = files.effective(config)
    if config.extend and (config.run_dir is None or not is_run(config.run_dir)):
        raise UsageError("--extend adds rounds to a run: name that run with --run-dir DIR")
    if config.run_dir is None:
        resumable = find_resumable(places.RUNS, partial(_is_same, toml=toml))
        if resumable is not None:
            logger.info("resuming run %s", resumable.run_id)
        return resumable
    if not is_run(config.run_dir):
        return None
    directory = RunDirectory.open(config.run_dir)
    if changed := _changed(directory, toml):
        more = " (more rounds: --extend N)" if any(difference.key == "rounds" for difference in changed) else ""
        if any(difference.key == "model-digest" for difference in changed):
            more += " (the source of --model has changed: restore it)"
        hidden = f" and {len(changed) - MOST_CHANGES} more" if len(changed) > MOST_CHANGES else ""
        settings = ", ".join(map(str, changed[:MOST_CHANGES])) + hidden
        raise RunError(
            f"run {directory.run_id} in {config.run_dir} was started with other settings ({settings}). "
            f"Start it with the old ones{more}, or choose another --run-dir"
        )
    return directory


def _changed(directory: RunDirectory, toml: str) -> list[Difference]:
    """Return the settings that differ from the run's. One that an older FedShelf did not have had its default.

    Raises:
        RunError: the run's configuration is not the one that it was created with.
    """
    recorded = directory.config_toml
    if files.digest(recorded) != directory.config_digest:
        raise RunError(
            f"'{directory.config}' is not the configuration that run {directory.run_id} was started with: it is "
            "damaged, or was edited. Restore it from a copy, or start a new run with another --run-dir"
        )
    defaults = {default.key: repr(default.new) for default in differences("", files.effective(RunConfig()))}
    found = differences(files.with_new_names(recorded), toml)
    return [change for change in found if change.old is not None or repr(change.new) != defaults.get(change.key)]


def _is_same(directory: RunDirectory, *, toml: str) -> bool:
    try:
        return not _changed(directory, toml)
    except RunError as error:
        logger.warning("this run is not resumed: %s", error)
        return False


def _check_whole(directory: RunDirectory) -> None:
    """Check that a run to resume has lost neither its database nor its checkpoints, which confirm each other.

    Raises:
        RunError: its checkpoints are missing. (After a crash, the first one may be.)
    """
    summary = run_summary(directory.path)
    if summary.reason in LOST:
        logger.warning("run %s: %s. A new one begins with the next round", directory.run_id, summary.reason)
    elif not directory.has_checkpoint and (len(summary.rounds) > 1 or summary.status is RunStatus.FINISHED):
        raise RunError(
            f"run {directory.run_id} in {directory.path} has finished {counted(len(summary.rounds), 'round')}, but "
            f"'{directory.checkpoints}' has no checkpoint to resume from. Restore that folder from a copy, or start a "
            "new run with another --run-dir"
        )


def _new_run(config: RunConfig) -> RunDirectory:
    run_id, toml = new_run_id(), files.effective(config)
    path = config.run_dir or places.RUNS / run_id
    return RunDirectory.create(path, run_id=run_id, config_toml=toml, config_digest=files.digest(toml))
