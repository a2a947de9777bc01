"""Opens a run on disk, new or resumed, and assembles its server."""

import csv
import io
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from fedshelf.algorithms.base import Asynchronous
from fedshelf.app.components import (
    ModuleFactory,
    aggregator_of,
    algorithm_of,
    bound_model_of,
    component_of,
    module_of,
    optional_components,
    personalization_of,
    plan_of,
    scan_test_photos,
    test_photos,
    trainable_module_of,
    uploads_of,
)
from fedshelf.app.model_card import save_global, save_initial
from fedshelf.compression.chain import parse
from fedshelf.compression.codec_policy import least_budget
from fedshelf.config import files, places
from fedshelf.config.families import FAMILIES, OPTIONAL
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import DataError, ModelError, RunError, UsageError
from fedshelf.core.events import Event, RoundFinished, RunStarted, RunStatus, WeightsLoaded
from fedshelf.core.ports import Checkpoints, MetricSink, Spool, Transport, VirtualClock
from fedshelf.core.text import counted, some
from fedshelf.data.cache import PhotoCache
from fedshelf.data.catalogue import Catalogue, load_aliases
from fedshelf.data.filesystem import file_problem, folder_problem
from fedshelf.data.folder import class_folder
from fedshelf.models.build import find_problem
from fedshelf.models.initial_weights import check_fit, extra_tensors, load_initial_weights, read_initial_weights
from fedshelf.models.own_model import find_source, use_model_path
from fedshelf.models.registry import is_own
from fedshelf.models.weights_packages import pretrained_source
from fedshelf.rounds import pipeline
from fedshelf.rounds.plan import GlobalModel, Plan, Ports
from fedshelf.rounds.server import Server
from fedshelf.storage.atomic_files import write_atomically
from fedshelf.storage.background import BackgroundCheckpoints, BackgroundWriter
from fedshelf.storage.checkpoints import FileCheckpoints
from fedshelf.storage.model_files import CARD, load_model_files
from fedshelf.storage.run_directory import Difference, RunDirectory, differences, is_run, new_run_id
from fedshelf.tracking.database import RunDatabase
from fedshelf.tracking.product_results import confusion_table
from fedshelf.tracking.queries import LOST, run_summary
from fedshelf.tracking.registry import SINKS
from fedshelf.tracking.runs import find_resumable
from fedshelf.tracking.sinks import Sinks
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.trainer import Score, evaluate

logger = logging.getLogger(__name__)

MOST_CHANGES = 8  # differences from a run's settings that are named

Evaluate = Callable[[Tensor], Score]
EvaluatorFactory = Callable[[Plan, Catalogue, BoundModel], Evaluate | None]
"""Creates central evaluation from a plan, its catalogue and the server's bound model."""


class SystemClock:
    """`Clock` on the system's monotonic clock."""

    def now(self) -> float:
        """See `Clock`."""
        return time.monotonic()


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
        ModelError: the source cannot be found.
        UsageError: there is no such folder, or `config` asks for another digest.
    """
    use_model_path(config.model_path)
    digest = None if make_module or not is_own(config.model) else find_source(config.model).digest
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
    config = with_own_model(config, make_module)
    existing = _existing_run(config)
    _check(config, make_module, existing)
    if existing is not None:
        _check_whole(existing)
    directory = existing or _new_run(config)
    began, optional = _HasBegun(), (*watchers, *optional_components(config, SINKS))
    with directory.lock():
        try:
            with closing(RunDatabase(directory.database)) as database:
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


def make_server(
    run: OpenedRun, *, transport: Transport, spool: Spool, stop: threading.Event, start_clients: int,
    make_evaluator: EvaluatorFactory | None = None, make_module: ModuleFactory | None = None,
    virtual: VirtualClock | None = None,
) -> Server:  # fmt: skip
    """Assemble the server of a run.

    Args:
        run: the run.
        transport: the transport to the clients.
        spool: storage for uploads.
        stop: set it to stop after the current step.
        start_clients: number of clients that must join before the catalogue is frozen and round 1 begins.
        make_evaluator: creates a different central evaluation; by default it runs in this process.
        make_module: creates the caller's own model, if there is one.
        virtual: the clock of a simulation.

    Returns:
        The server.
    """
    config, directory = run.config, run.directory
    kept = Catalogue.load(directory.catalogue) if directory.catalogue.exists() else None
    aliases, given = ({}, None) if kept else _given_names(config)
    if kept and config.catalogue:
        with suppress(DataError):  # the file may be gone
            if Catalogue.load(config.catalogue).names != kept.names:
                logger.warning(
                    "--catalogue %s has changed since the run began and is not used: the run keeps its products. A new "
                    "run with --init takes over the rows of those that it has, too",
                    config.catalogue,
                )
    plan = plan_of(
        config, run_id=directory.run_id, start_clients=start_clients, catalogue=kept or given, aliases=aliases
    )  # fmt: skip
    evaluator = _unless_personal(config, make_evaluator or _evaluate_here(config))
    checkpoints: Checkpoints = FileCheckpoints(directory.checkpoints)
    ports = Ports(
        transport=transport, spool=spool, sink=run.sink,
        checkpoints=BackgroundCheckpoints(checkpoints, run.writer) if run.writer else checkpoints,
        clock=SystemClock(), stop=stop, virtual=virtual,
    )  # fmt: skip
    return Server(
        plan=plan, ports=ports, algorithm=algorithm_of(config),
        build_model=partial(_global_model, run, evaluator=partial(evaluator, plan), make_module=make_module),
        keep_catalogue=lambda catalogue: catalogue.save(directory.catalogue),
    )  # fmt: skip


def _global_model(
    run: OpenedRun, catalogue: Catalogue, *, evaluator: Callable[[Catalogue, BoundModel], Evaluate | None],
    make_module: ModuleFactory | None,
) -> GlobalModel:  # fmt: skip
    """Create the run's model over the classes of `catalogue`.

    Raises:
        UsageError: --byte-budget is too small for it.
    """
    config, kept = run.config, _has_initial_model(run.directory)
    named = config.model_copy(update={"pretrained": config.pretrained and not kept})
    bound = bound_model_of(named, catalogue, device=config.device, make_module=make_module)
    _check_budget(config, bound)
    loaded = None
    if kept:
        loaded = _load_kept(bound, run.directory)
    elif config.init is not None or config.pretrained:
        if config.init is not None:
            weights = read_initial_weights(config.init)
            loaded = load_initial_weights(bound.module, weights, catalogue.names, _given_names(config)[0])
        else:
            loaded = WeightsLoaded(
                file=pretrained_source(config.model), added=catalogue.names, reason="it knows other classes"
            )
        save_initial(run.directory.initial_model, bound, catalogue, loaded)
    evaluate_on_server = evaluator(catalogue, bound)
    known: list[bool] = []
    if evaluate_on_server and config.test_dir:
        classes = [class_folder(photo.class_path) for photo in scan_test_photos(config.test_dir).train]
        known = [catalogue.index_of(folder) is not None for folder in classes]

    def publish(params: Tensor, record: RoundFinished, best: bool) -> None:
        job = partial(_publish, run, bound, catalogue, params, record, best, loaded)
        run.writer.do(job) if run.writer else job()

    return GlobalModel(
        layout=bound.params.layout,
        initial=bound.params.shared.detach().cpu().clone(),
        frozen=bound.frozen_values(),
        head=bound.output_layer,
        evaluate_on_server=evaluate_on_server,
        publish=publish,
        loaded=loaded,
        num_test=sum(known) if known else None,
        num_test_left_out=known.count(False),
    )


def _given_names(config: RunConfig) -> tuple[dict[str, str], Catalogue | None]:
    """Load the aliases and the catalogue from the files that `config` names, if any.

    Raises:
        DataError: a file cannot be read, or the two contradict each other.
    """
    aliases = load_aliases(config.aliases) if config.aliases else {}
    catalogue = Catalogue.load(config.catalogue) if config.catalogue else None
    return aliases, catalogue.with_aliases(aliases) if catalogue and aliases else catalogue


def _check(config: RunConfig, make_module: ModuleFactory | None, existing: RunDirectory | None) -> None:
    """Detect later failures before the run is created and clients wait for it.

    Args:
        config: the run's configuration.
        make_module: creates the caller's own model, if there is one.
        existing: the run to resume, if any. It keeps its catalogue and the weights that it started from: the files may
            be gone.

    Raises:
        UsageError: settings are invalid (all are listed).
        DataError: a configured file cannot be used.
    """
    components = [component_of(config, family) for family in FAMILIES]
    components += [component for registry in OPTIONAL.values() for component in optional_components(config, registry)]
    has_weights = existing is not None and _has_initial_model(existing)
    has_catalogue = existing is not None and existing.catalogue.exists()
    problems = [
        find_problem(config.model, pretrained=config.pretrained)
        or (None if make_module else _problem_with_own_model(config))
        or (None if has_weights else _problem_with_weights(config, make_module)),
        *_problems_with_codecs(config), *_problems_with_asynchrony(config), *_problems_with_sums(config),
        *(problem for component in components for problem in getattr(component, "problems", list)()),
    ]  # fmt: skip
    for key, path, find in (
        ("catalogue", None if has_catalogue else config.catalogue, file_problem),
        ("aliases", None if has_catalogue else config.aliases, file_problem),
        ("data-dir", config.data_dir, folder_problem), ("test-dir", config.test_dir, folder_problem),
    ):  # fmt: skip
        if path is not None and (problem := find(path)):
            problems.append(f"--{key} {path}: {problem}")
    if config.data_dir is not None and config.test_dir is not None and config.test_dir.parent == config.data_dir:
        problems.append(f"--test-dir {config.test_dir} lies in --data-dir, and would be trained on as a store")
    if config.dynamic_batch and config.engine in ("vmap", "auto"):
        problems.append(
            f"--dynamic-batch with --engine {config.engine}: clients that are trained in one computation share one "
            "batch size. Use --engine local (with --workers) or ray, or leave --dynamic-batch out"
        )
    if not any(problems):
        problems.append(_problem_with_training(config, make_module))
        stages = uploads_of(config).stages
        problems += pipeline.problems(stages)
        problems += [
            f"--norm-bound {config.norm_bound} with {stage.declares.setting}: the server sees no single upload that it "
            "could bound. Use auto or off"
            for stage in stages
            if stage.declares.masks and config.norm_bound not in ("auto", "off")
        ]
    found = [problem for problem in problems if problem]
    if found:
        raise UsageError(*found)
    if not has_catalogue:
        _given_names(config)
    for finding in scan_test_photos(config.test_dir).findings if config.test_dir else ():
        logger.warning("--test-dir: %s", finding)


def _problem_with_own_model(config: RunConfig) -> str | None:
    try:
        if is_own(config.model):
            module_of(config, 2)
    except ModelError as error:
        return str(error)
    return None


def _problem_with_training(config: RunConfig, make_module: ModuleFactory | None) -> str | None:
    try:
        if config.train != "all":
            trainable_module_of(config.model_copy(update={"pretrained": False}), 2, make_module)
    except ModelError as error:
        return str(error)
    return None


def _problem_with_weights(config: RunConfig, make_module: ModuleFactory | None) -> str | None:
    """Explain why no run can start from --init or --pretrained, whatever its catalogue; logs what will start fresh."""
    if config.init is None and not config.pretrained:
        return None
    try:
        weights = read_initial_weights(config.init) if config.init else None
        labels = weights.labels if weights else None
        module = module_of(config, len(labels or ()) or 2, make_module)
        given = weights.tensors if weights else module.state_dict()
        reason = check_fit(module, weights) if weights else ""
        extra = extra_tensors(module, weights) if weights else []
        personal = personalization_of(config).personal_names(module) & given.keys()
    except ModelError as error:
        return str(error)
    source = f"--init {config.init}" if config.init else "--pretrained"
    if reason:
        logger.warning("%s: the head will start fresh: %s", source, reason)
    if extra:
        logger.warning("%s: the model lacks the parts of %d of its tensors, which are left out: %s",
            source, len(extra), some(extra))  # fmt: skip
    if personal:
        logger.warning("%s: %d of its tensors stay at the stores with --personalize %s, and start fresh there",
            source, len(personal), config.personalize)  # fmt: skip
    if config.pretrained and any(isinstance(layer, nn.GroupNorm) for layer in module.modules()):
        logger.warning("--pretrained: with --norm group, the normalization layers start fresh")
    return None


def _problems_with_codecs(config: RunConfig) -> list[str]:
    found = []
    for key, text in (("codec-up", config.codec_up), ("codec-down", config.codec_down)):
        try:
            parse(text)
        except UsageError as error:
            found += [f"--{key} {text}: {problem}" for problem in error.args]
        if config.byte_budget is not None and text != "none":
            found.append(f"--{key} with --byte-budget: a budget chooses the codecs by itself. Leave one of the two out")
    return found


def _problems_with_asynchrony(config: RunConfig) -> list[str]:
    if not isinstance(algorithm_of(config), Asynchronous):
        return []
    found = []
    if aggregator_of(config).leaves_out:
        found.append(
            f"--aggregator {config.aggregator} with --algorithm {config.algorithm}: a client that it leaves out may "
            "have begun its next task from a state that must be undone. Use median or trimmed-mean"
        )
    if config.refit_head:
        found.append(f"--refit-head with --algorithm {config.algorithm}: clients may still be at work. Leave it out")
    if config.quorum is not None:
        found.append(f"--quorum with --algorithm {config.algorithm}: a round ends when --buffer-size uploads are in")
    if config.sampling == "size":
        found.append(
            f"--sampling size with --algorithm {config.algorithm}: all clients work all the time, and uploads count "
            "alike. Use uniform or availability"
        )
    pacing = {
        "straggler-factor": config.straggler_factor is not None, "over-selection": config.over_selection > 0,
        "local-work": config.local_work != "fixed",
    }  # fmt: skip
    found += [
        f"--{key} with --algorithm {config.algorithm}: asynchronous rounds do not wait for slow clients. Leave it out"
        for key, is_set in pacing.items()
        if is_set
    ]
    return found


def _problems_with_sums(config: RunConfig) -> list[str]:
    """What an algorithm of exact sums cannot be combined with."""
    if not algorithm_of(config).sums:
        return []
    wrong = {
        f"--train {config.train}": config.train != "head",
        f"--aggregator {config.aggregator}": config.aggregator != "mean",
        f"--norm-bound {config.norm_bound}": config.norm_bound not in ("auto", "off"),
        f"--personalize {config.personalize}": config.personalize not in ("none", "finetune"),
        f"--codec-up {config.codec_up}": config.codec_up != "none",
        "--byte-budget": config.byte_budget is not None,
        f"--local-work {config.local_work}": config.local_work != "fixed",
        "--attack": config.attack in ("sign-flip", "scale"),
        **{stage.declares.setting: True for stage in uploads_of(config).stages},
    }
    return [
        f"{flag} with --algorithm {config.algorithm}: stores send exact sums over their photos' features. Leave it out"
        for flag, is_set in wrong.items()
        if is_set
    ]


def _check_budget(config: RunConfig, bound: BoundModel) -> None:
    least = 2 * least_budget(bound.params.layout) / 1e6
    if config.byte_budget is not None and config.byte_budget < least:
        raise UsageError(
            f"--byte-budget {config.byte_budget:g}: this model needs at least {least:.3g} MB per client and round, "
            "half each way, with the smallest codec"
        )


def _has_initial_model(directory: RunDirectory) -> bool:
    return (directory.initial_model / CARD).is_file()


def _load_kept(bound: BoundModel, directory: RunDirectory) -> WeightsLoaded | None:
    """Load the weights that the run started from: the given file may be gone, and must not be another one."""
    tensors, _, card = load_model_files(directory.initial_model)
    bound.module.load_state_dict(tensors)
    loaded: dict[str, Any] | None = card["initial_weights"]
    if loaded is None:
        return None
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in loaded.items()}
    return WeightsLoaded(**fields)


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
    if summary.reason == LOST:
        logger.warning("run %s: %s. A new one begins with the next round", directory.run_id, LOST)
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


def _evaluate_here(config: RunConfig) -> EvaluatorFactory:
    def make(plan: Plan, catalogue: Catalogue, bound: BoundModel) -> Evaluate | None:
        if config.test_dir is None:
            return None
        photos = test_photos(config.test_dir, config, catalogue, PhotoCache(root=places.photo_cache()), bound)

        def evaluate_on_server(params: Tensor) -> Score:
            bound.load(params)
            return evaluate(bound, photos)

        return evaluate_on_server

    return make


def _unless_personal(config: RunConfig, make_evaluator: EvaluatorFactory) -> EvaluatorFactory:
    """Skip evaluation of a global model that lacks the stores' own tensors, because its result is meaningless."""

    def make(plan: Plan, catalogue: Catalogue, bound: BoundModel) -> Evaluate | None:
        if not len(bound.params.personal):
            return make_evaluator(plan, catalogue, bound)
        if config.test_dir is not None:
            logger.info(
                "--test-dir is not used: with --personalize %s the server has no whole model", config.personalize
            )
        return None

    return make


def _publish(
    run: OpenedRun, bound: BoundModel, catalogue: Catalogue, params: Tensor, record: RoundFinished, best: bool,
    loaded: WeightsLoaded | None,
) -> None:  # fmt: skip
    """Save the model after a round to `model/` or `model/best/`, and the last round's confusion matrix."""
    bound.load(params)
    folder = run.directory.best_model if best else run.directory.model
    if record.report is not None and record.report.confusion:
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows(confusion_table(record.report, catalogue))
        write_atomically(run.directory.confusion, table.getvalue())
    save_global(folder, bound, run.config, catalogue, run_id=run.directory.run_id, record=record, loaded=loaded)
