"""Assembles the server of an opened run."""

import csv
import io
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedshelf.algorithms.base import Asynchronous
from fedshelf.app.components import (
    algorithm_of,
    encrypted_form_of,
    given_names,
    personalization_of,
    plan_of,
)
from fedshelf.app.differential_privacy import delta_of, noisy_mean_of
from fedshelf.app.model import ModuleFactory, bound_model_of, load_initial
from fedshelf.app.model_card import save_global, save_initial
from fedshelf.app.photos import scan_test_photos, test_photos
from fedshelf.app.run import OpenedRun
from fedshelf.app.run_catalogue import RunCatalogue
from fedshelf.app.teacher import TeacherModel, teacher_of
from fedshelf.compression.codec_policy import least_budget
from fedshelf.config import places
from fedshelf.config.schema import RunConfig
from fedshelf.core.choices import Candidate
from fedshelf.core.errors import DataError, ModelError, UsageError
from fedshelf.core.events import RoundFinished, WeightsLoaded
from fedshelf.core.ports import Checkpoints, IdentityKey, Spool, Transport, VirtualClock
from fedshelf.data.cache import PhotoCache
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.folder import class_folder
from fedshelf.data.photo_files import Photo, photos_below
from fedshelf.models.head import head_names
from fedshelf.models.initial_weights import load_initial_weights, read_initial_weights
from fedshelf.models.weights_packages import pretrained_source
from fedshelf.privacy.homomorphic import cost
from fedshelf.rounds.plan import GlobalModel, Plan, Ports, SentTeacher
from fedshelf.rounds.server import Server
from fedshelf.storage.atomic_files import write_atomically
from fedshelf.storage.background import BackgroundCheckpoints
from fedshelf.storage.checkpoints import FileCheckpoints
from fedshelf.storage.model_files import has_model
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.tracking.product_results import confusion_table
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.ensemble import Ensemble
from fedshelf.training.trainer import Score, evaluate

logger = logging.getLogger(__name__)

Evaluate = Callable[[Tensor], Score]
EvaluatorFactory = Callable[[Plan, Catalogue, BoundModel], Evaluate | None]
"""Creates central evaluation from a plan, its catalogue and the server's bound model."""


class SystemClock:
    """`Clock` on the system's monotonic clock."""

    def now(self) -> float:
        """See `Clock`."""
        return time.monotonic()


def make_server(
    run: OpenedRun, *, transport: Transport, spool: Spool, stop: threading.Event, start_clients: int,
    make_evaluator: EvaluatorFactory | None = None, make_module: ModuleFactory | None = None,
    virtual: VirtualClock | None = None, identities: Callable[[], Mapping[str, IdentityKey] | None] = lambda: None,
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
        identities: returns the stores' identity keys by name; None if they have none.

    Returns:
        The server.
    """
    config, directory = run.config, run.directory
    saved = RunCatalogue(directory, config)
    kept = saved.used
    aliases, given = ({}, None) if kept else given_names(config)
    if kept and config.catalogue:
        with suppress(DataError):  # the file may be gone
            given_names_now = Catalogue.load(config.catalogue).names
            if kept.names[: len(given_names_now)] != given_names_now:
                logger.warning(
                    "--catalogue %s has changed since the run began and is not used: the run keeps its products. A new "
                    "run with --init takes over the rows of those that it has, too",
                    config.catalogue,
                )
    plan = plan_of(
        config, run_id=directory.run_id, start_clients=start_clients, catalogue=kept or given, aliases=aliases
    )  # fmt: skip
    teacher = teacher_of(config)
    plan = replace(plan, noisy_mean=noisy_mean_of(config), delta=delta_of(config), teacher=_sent(teacher))
    evaluator = _unless_personal(config, make_evaluator or _evaluate_here(config))
    checkpoints: Checkpoints = FileCheckpoints(directory.checkpoints)
    ports = Ports(
        transport=transport, spool=spool, sink=run.sink,
        checkpoints=BackgroundCheckpoints(checkpoints, run.writer) if run.writer else checkpoints,
        clock=SystemClock(), stop=stop, virtual=virtual, identities=identities,
    )  # fmt: skip
    return Server(
        plan=plan, ports=ports, algorithm=algorithm_of(config),
        build_model=partial(
            _global_model, run, evaluator=partial(evaluator, plan), make_module=make_module, teacher=teacher
        ),
        keep_catalogue=saved.use,
        # A simulation's result must not depend on when somebody changes a file. It is used at the next start.
        changed_catalogue=saved.changed if virtual is None else lambda: None,
    )  # fmt: skip


def _global_model(
    run: OpenedRun, catalogue: Catalogue, *, evaluator: Callable[[Catalogue, BoundModel], Evaluate | None],
    make_module: ModuleFactory | None, teacher: TeacherModel | None,
) -> GlobalModel:  # fmt: skip
    """Create the run's model over the classes of `catalogue`.

    Raises:
        UsageError: --byte-budget is too small for it, or --teacher knows other products.
    """
    config, kept = run.config, has_model(run.directory.initial_model)
    named = config.model_copy(update={"pretrained": config.pretrained and not kept})
    bound = bound_model_of(named, catalogue, device=config.device, make_module=make_module)
    _check_budget(config, bound)
    _check_teacher(teacher, catalogue)
    loaded = None
    if kept:
        loaded = _load_kept(bound, run.directory, catalogue)
    elif config.init is not None or config.pretrained:
        if config.init is not None:
            weights = read_initial_weights(config.init)
            loaded = load_initial_weights(bound.module, weights, catalogue.names, given_names(config)[0])
        else:
            loaded = WeightsLoaded(
                file=pretrained_source(config.model), added=catalogue.names, reason="it knows other classes"
            )
        save_initial(run.directory.initial_model, bound, catalogue, loaded)
    elif bound.frozen_values() is not None:  # which would be drawn differently for a catalogue that has grown
        save_initial(run.directory.initial_model, bound, catalogue, None)
    evaluate_on_server = evaluator(catalogue, bound)
    ensemble = _ensemble_of(named, catalogue, bound, make_module)
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
        rows=head_names(bound.module),
        note=encryption_cost(config, bound),
        evaluate_on_server=evaluate_on_server,
        publish=publish,
        loaded=loaded,
        num_test=sum(known) if known else None,
        num_test_left_out=known.count(False),
        fuse=None if ensemble is None else ensemble.fuse,
    )


def _ensemble_of(
    config: RunConfig, catalogue: Catalogue, bound: BoundModel, make_module: ModuleFactory | None
) -> Ensemble | None:
    """What distills the stores' models of a round, on a model of its own: `bound` is used by other threads."""
    if config.unlabelled_dir is None:
        return None
    fresh = config.model_copy(update={"pretrained": False})
    own = bound_model_of(fresh, catalogue, device=config.device, make_module=make_module)
    own.params.frozen.copy_(bound.params.frozen)
    files = [Photo(class_path="", path=path) for path in photos_below(config.unlabelled_dir)]
    if not files:
        raise DataError(f"--unlabelled-dir '{config.unlabelled_dir}' holds no photo")
    images = PhotoCache(root=places.photo_cache()).open(files, config.image_size).images
    return Ensemble(
        bound_model=own, images=images, num_steps=config.ensemble_steps, learning_rate=config.ensemble_lr
    )  # fmt: skip


def encryption_cost(config: RunConfig, bound: BoundModel) -> str:
    """What homomorphic encryption costs in a round, measured on this machine; "" without it."""
    form = encrypted_form_of(config, bound)
    if form is None:
        return ""
    algorithm = algorithm_of(config).for_model(bound.params.layout, bound.output_layer)
    size = algorithm.buffer_size if isinstance(algorithm, Asynchronous) else config.min_clients
    try:
        unit = cost.measure(time.process_time)
    except UsageError:  # the server needs no TenSEAL
        return cost.without_seconds(form.packing)
    return cost.estimate(form.packing, size, unit).text


def _check_budget(config: RunConfig, bound: BoundModel) -> None:
    least = 2 * least_budget(bound.params.layout) / 1e6
    if config.byte_budget is not None and config.byte_budget < least:
        raise UsageError(
            f"--byte-budget {config.byte_budget:g}: this model needs at least {least:.3g} MB per client and round, "
            "half each way, with the smallest codec"
        )


def _sent(teacher: TeacherModel | None) -> SentTeacher | None:
    return None if teacher is None else SentTeacher(description=teacher.text, values=teacher.values)


def _check_teacher(teacher: TeacherModel | None, catalogue: Catalogue) -> None:
    if teacher is not None:
        try:
            teacher.open(catalogue.names, torch.device("cpu"))
        except ModelError as error:
            raise UsageError(f"--teacher: {error}") from None


def _load_kept(bound: BoundModel, directory: RunDirectory, catalogue: Catalogue) -> WeightsLoaded | None:
    """Load the weights that the run started from: the given file may be gone, and must not be another one."""
    card = load_initial(bound, directory.initial_model, catalogue)
    loaded: dict[str, Any] | None = card["initial_weights"]
    if loaded is None:
        return None
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in loaded.items()}
    return WeightsLoaded(**fields)


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
    """Skip evaluation of a global model that is not whole without the stores' own tensors."""

    def make(plan: Plan, catalogue: Catalogue, bound: BoundModel) -> Evaluate | None:
        if Candidate.GLOBAL in personalization_of(config).candidates:
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
