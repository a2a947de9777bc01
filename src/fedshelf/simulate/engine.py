"""Runs a whole federation on this machine: the rounds' own code with simulated clients."""

import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fedshelf.app.components import closed_form_of, encryption_of, mask_of, summed_codec_of
from fedshelf.app.model import ModuleFactory
from fedshelf.app.run import open_run, with_own_model
from fedshelf.app.server import Evaluate, make_server
from fedshelf.app.setup import masking_terms
from fedshelf.app.teacher import teacher_folder, with_teacher
from fedshelf.config import places
from fedshelf.config.schema import RunConfig, modular_for, recommended
from fedshelf.config.without_effect import without_effect_on
from fedshelf.core.choices import EngineName
from fedshelf.core.errors import UsageError
from fedshelf.core.events import RunStatus
from fedshelf.core.ports import MetricSink
from fedshelf.core.text import counted, some
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.layout import store_folders
from fedshelf.data.photo_set import PhotoSet
from fedshelf.privacy.homomorphic import seal
from fedshelf.privacy.homomorphic.settings import ANY
from fedshelf.privacy.secure_aggregation.context import LEAST_MEMBERS
from fedshelf.rounds.plan import Plan, setup_of
from fedshelf.scheduling import cohort as cohorts
from fedshelf.simulate.attacks import attack_of
from fedshelf.simulate.client_runner import Backend, ClientRunner, InProcess
from fedshelf.simulate.masked import MaskedBackend, encrypting_client, masking_client
from fedshelf.simulate.stores import FolderStores, MemoryStores, Stores, join_of
from fedshelf.simulate.virtual import dropout_of, durations_of
from fedshelf.simulate.virtual_time_transport import VirtualTimeTransport
from fedshelf.simulate.vmap import VmapBackend
from fedshelf.simulate.vmap_choice import engine_of
from fedshelf.simulate.workers import WorkerPool
from fedshelf.storage.run_directory import RunDirectory, is_run
from fedshelf.storage.spool import MemorySpool
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.loop import Run, alone
from fedshelf.training.malloc import keep_freed_memory
from fedshelf.training.resources import default_threads
from fedshelf.training.trainer import total

if TYPE_CHECKING:
    from fedshelf.simulate.ray_pool import RayPool  # Ray is an optional dependency

logger = logging.getLogger(__name__)
SERVER_STORE = "server"
"""Name of the only store of a run whose photos are at the server."""


def simulate(
    config: RunConfig, *, watchers: tuple[MetricSink, ...] = (), stop: threading.Event | None = None
) -> tuple[RunStatus, RunDirectory]:  # fmt: skip
    """Simulate a run on the stores below `config.data_dir`.

    Args:
        config: the run's configuration.
        watchers: sinks in addition to the run's database.
        stop: set it to stop after the current step.

    Returns:
        The run's status and its directory.

    Raises:
        FedShelfError: see `open_run` and `rounds.server.Server.run`.
    """
    if config.data_dir is None:
        raise UsageError("--data-dir is missing: the folder of the stores, with one folder of photos per store")
    folders = {SERVER_STORE: config.data_dir} if config.mode == "central" else store_folders(config.data_dir)
    stores = FolderStores(folders=folders, cache=places.photo_cache(), test_dir=config.test_dir)
    return simulate_stores(config, stores, watchers=watchers, stop=stop)


def simulate_in_memory(
    config: RunConfig, *, stores: Mapping[str, PhotoSet], test: PhotoSet | None, class_names: tuple[str, ...],
    model: ModuleFactory | None = None, watchers: tuple[MetricSink, ...] = (), stop: threading.Event | None = None,
) -> tuple[RunStatus, RunDirectory]:  # fmt: skip
    """Simulate a run on photo sets in memory.

    Args:
        config: the run's configuration.
        stores: photos by store, with labels that index `class_names`.
        test: photos for central evaluation.
        class_names: class names by label.
        model: creates the caller's own model; picklable.
        watchers: sinks in addition to the run's database.
        stop: set it to stop after the current step.

    Returns:
        The run's status and its directory.

    Raises:
        FedShelfError: see `open_run` and `rounds.server.Server.run`.
    """
    source = MemoryStores(stores, test, class_names, val_fraction=config.val_fraction, seed=config.seed)
    return simulate_stores(config, source, model=model, watchers=watchers, stop=stop)


def _check_sums(config: RunConfig, names: Sequence[str]) -> None:
    """Check that the stores are enough for sums that hide each of them.

    Raises:
        UsageError: they are not, or the store that decrypts is none of them.
    """
    decryptor, mask = encryption_of(config).decryptor, mask_of(config)
    if encryption_of(config).is_on and decryptor not in (None, ANY, *names):
        raise UsageError(f"--he-decryptor {decryptor}: there is no such store. The stores are {some(names)}")
    if not mask.is_on:
        return
    members, threshold = cohorts.size(len(names), fraction=config.fraction), mask.threshold
    each = f"{counted(members, 'store')} in a round"
    if threshold is not None and threshold > members:
        raise UsageError(
            f"--secagg-threshold {threshold}: there are only {each}. Choose a smaller one, or raise --fraction"
        )
    if threshold is not None and 2 * threshold <= members:
        raise UsageError(
            f"--secagg-threshold {threshold}: that is not more than half of {each}, so two halves could open two "
            f"sums. Use {members // 2 + 1} or more"
        )
    if members < LEAST_MEMBERS:
        raise UsageError(
            f"--secagg with --fraction {config.fraction:g}: {each} hide nothing in their sum, which takes "
            f"{LEAST_MEMBERS}. Raise --fraction"
        )


def _with_room(config: RunConfig, num_stores: int) -> RunConfig:
    """The configuration with room for the sum of all uploads of a round, if hiding them implied the codec."""
    if config.codec_up != recommended(config.__dict__).get("codec_up") or config.algorithm == "fedbuff":
        return config
    most = cohorts.over_selected(
        cohorts.size(num_stores, fraction=config.fraction), num_stores, config.over_selection
    )  # fmt: skip
    if config.dp == "client" or closed_form_of(config) is not None:  # drawn independently; of all photos
        most = num_stores
    codec = summed_codec_of(config)
    return config if codec is None else config.model_copy(update={"codec_up": modular_for(codec.bits, most)})


def simulate_stores(
    config: RunConfig, stores: Stores, *, model: ModuleFactory | None = None, watchers: tuple[MetricSink, ...] = (),
    stop: threading.Event | None = None, training: Run = alone,
) -> tuple[RunStatus, RunDirectory]:  # fmt: skip
    """Simulate a run on any kind of stores.

    Args:
        config: the run's configuration.
        stores: the stores.
        model: creates the caller's own model; picklable.
        watchers: sinks in addition to the run's database.
        stop: set it to stop after the current step.
        training: trains a client's model; picklable.

    Returns:
        The run's status and its directory.

    Raises:
        FedShelfError: see `open_run` and `rounds.server.Server.run`.
    """
    config = with_teacher(with_own_model(config, model))  # before workers are forked
    if encryption_of(config).is_on:
        seal.require()
    names = stores.names()
    for flag, needed in (("--min-clients", config.min_clients), ("--quorum", config.quorum or 0)):
        if len(names) < needed:
            raise UsageError(
                f"{flag} {needed}: there {'is' if len(names) == 1 else 'are'} only "
                f"{counted(len(names), 'store')} ({some(names)}). Choose a smaller number, or add stores"
            )
    _check_sums(config, names)
    for sentence in without_effect_on(config, len(names)):
        logger.warning(sentence)
    config = _with_room(config, len(names))
    joins = [join_of(stores, name) for name in names]  # an unusable folder fails here, before the run is created
    durations = durations_of(config, names)
    config = config.model_copy(
        update={
            # A client that only waits for a worker is not late; in virtual time clients do not wait.
            "round_timeout": config.round_timeout if config.slowdowns else math.inf,
            "threads": config.threads or default_threads(max(1, config.workers)),
        }
    )
    runner = ClientRunner(
        stores=stores, device=config.device, make_module=model, model_path=config.model_path,
        attack=attack_of(config, names), training=training, teachers=_teachers(config),
    )  # fmt: skip
    # Workers are forked before the run starts its threads.
    opening = open_run(config, watchers=watchers, in_background=True, make_module=model)
    with _pool(config, runner) as pool, opening as run:
        runner.states, runner.models = run.directory.client_states, run.directory.stores
        engine = engine_of(run.directory, config, stores, model)
        backend = _backend(pool, runner, engine)
        if mask_of(config).is_on:
            backend = MaskedBackend(backend, partial(masking_client, lambda setup: masking_terms(runner.open(setup))))
        if encryption_of(config).is_on:
            backend = MaskedBackend(backend, partial(encrypting_client, lambda setup: runner.open(setup).encryption))
        transport = VirtualTimeTransport(backend, joins, durations, dropout_of(config), together=engine == "vmap")
        scorer = runner if pool is None else pool
        server = make_server(
            run,
            transport=transport,
            virtual=transport,
            spool=MemorySpool(),
            stop=stop or threading.Event(),
            start_clients=len(names),
            make_evaluator=partial(_evaluator, scorer) if stores.has_test else lambda *found: None,
            make_module=model,
        )
        return server.run(), run.directory


def _teachers(config: RunConfig) -> Path | None:
    """The folder of the models that stores have chosen in the teacher's run; None if the teacher is of no run."""
    folder = teacher_folder(config)
    return RunDirectory.open(folder.parent).stores if folder is not None and is_run(folder.parent) else None


@contextmanager
def _pool(config: RunConfig, runner: ClientRunner) -> "Iterator[WorkerPool | RayPool | None]":
    """Yield the processes that run clients; None if this process runs them."""
    if config.engine == "ray":
        from fedshelf.simulate.ray_pool import RayPool

        with RayPool(runner, max(1, config.workers), threads=config.threads) as actors:
            yield actors
    elif config.workers:
        with WorkerPool(runner, config.workers, threads=config.threads) as workers:
            yield workers
    else:
        keep_freed_memory()
        yield None


def _backend(pool: "WorkerPool | RayPool | None", runner: ClientRunner, engine: EngineName) -> Backend:
    """Select what runs the clients."""
    if isinstance(pool, WorkerPool):
        pool.together = engine == "vmap"
    if pool is not None:
        return pool
    return VmapBackend(runner) if engine == "vmap" else InProcess(runner.run)


def _evaluator(
    scorer: "ClientRunner | WorkerPool | RayPool", plan: Plan, catalogue: Catalogue, bound: BoundModel
) -> Evaluate:
    setup = setup_of(plan, catalogue, bound.params.layout, bound.frozen_values())
    return lambda params: total(scorer.evaluate(setup, params))
