"""From configuration to objects: everything but transports is made here, and only here."""

import logging
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn

from fedshelf.algorithms.base import Algorithm, Asynchronous
from fedshelf.algorithms.reduce import Aggregator
from fedshelf.algorithms.robust import bounded
from fedshelf.compression.chain import parse
from fedshelf.compression.codec_policy import CodecPolicy
from fedshelf.compression.codec_stage import Encode
from fedshelf.config import files
from fedshelf.config.families import FAMILIES
from fedshelf.config.schema import RunConfig
from fedshelf.core.choices import DeviceName
from fedshelf.core.errors import DataError, RefusedError
from fedshelf.core.messages import Comparison, Ready, Setup
from fedshelf.core.rng import Rng
from fedshelf.core.settings import load
from fedshelf.core.stages import Stage
from fedshelf.core.text import some
from fedshelf.data.augmentation import Augmentation
from fedshelf.data.cache import PhotoCache, none_usable
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.dataset import PhotoSet, load_photos
from fedshelf.data.folder import PhotoFolder, has_split, scan
from fedshelf.models.build import ModelSettings, build
from fedshelf.personalization.base import Personalization
from fedshelf.personalization.model_selection import ModelSelection
from fedshelf.privacy.clipping import Clip
from fedshelf.rounds.client import Work
from fedshelf.rounds.pipeline import UploadPipeline
from fedshelf.rounds.plan import Plan, RoundSettings
from fedshelf.scheduling.early_stopping import EarlyStopping
from fedshelf.scheduling.work_assignment import Pacing
from fedshelf.scheduling.workload import Workload
from fedshelf.training import schedule
from fedshelf.training.batch_size import BatchSizes, lr_scale
from fedshelf.training.bound_model import BoundModel, TrainingSettings
from fedshelf.training.compiled import choose_forward
from fedshelf.training.device import choose
from fedshelf.training.trainer import Trainer

logger = logging.getLogger(__name__)

REJOIN_GRACE_SECONDS = 120.0  # a store's computer may need that long to start Python and reconnect

ModuleFactory = Callable[[int], nn.Module]
"""Makes a module for a number of classes: a model of the caller's own, in place of one by name."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StorePhotos:
    """What one store trains and validates on; `num_left_out` photos are of classes not in the catalogue."""

    train: PhotoSet
    validation: PhotoSet
    num_left_out: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedSetup:
    """A setup turned into objects: what all clients of one process share. `batch_sizes` are there where each client has
    its own."""

    setup: Setup
    config: RunConfig
    catalogue: Catalogue
    algorithm: Algorithm
    bound_model: BoundModel
    uploads: UploadPipeline
    personalization: Personalization
    batch_sizes: BatchSizes | None = None


SaveModel = Callable[[OpenedSetup, BoundModel, Comparison], None]
"""Takes the model on the workbench, which a store has chosen."""


def component_of(config: RunConfig, family: str) -> Any:
    """The component of a family that the run has chosen, made with its settings."""
    return config.settings_of(load(FAMILIES[family][getattr(config, family)]))


def algorithm_of(config: RunConfig) -> Algorithm:
    """The configured algorithm, both halves."""
    return cast(Algorithm, component_of(config, "algorithm"))


def aggregator_of(config: RunConfig) -> Aggregator:
    """How uploads become one."""
    aggregator = cast(Aggregator, component_of(config, "aggregator"))
    return aggregator if config.norm_bound is None else bounded(aggregator, config.norm_bound)


def personalization_of(config: RunConfig) -> Personalization:
    """What stays at the stores, and how."""
    return cast(Personalization, component_of(config, "personalize"))


def client_lr_of(config: RunConfig) -> Callable[[int], float]:
    """The learning rate of local training by round."""

    def learning_rate(round: int) -> float:
        return schedule.client_lr(
            config.client_lr, schedule=config.lr_schedule, warmup_rounds=config.warmup_rounds, round=round,
            num_rounds=config.rounds,
        )  # fmt: skip

    return learning_rate


def codec_policy_of(config: RunConfig, codec: str) -> CodecPolicy:
    """How one direction's vectors travel; a budget is half each way.

    Raises:
        UsageError: `codec` is no chain of codecs.
    """
    budget = None if config.byte_budget is None else int(config.byte_budget * 1_000_000 / 2)
    return CodecPolicy(codec=parse(codec), byte_budget=budget, rng=Rng(config.seed))


def uploads_of(config: RunConfig) -> UploadPipeline:
    """What uploads pass on their way, at both ends."""
    policy = codec_policy_of(config, config.codec_up)
    stages: list[Stage] = [
        *([] if config.clip_norm is None else [Clip(max_norm=config.clip_norm)]),
        *([] if policy.is_plain else [Encode(policy=policy)]),
    ]
    return UploadPipeline(stages=tuple(stages))


def model_settings(config: RunConfig, num_classes: int) -> ModelSettings:
    """The configured model for `num_classes`. Pretrained weights are the server's matter (clients receive them, and
    the configuration that clients are sent says nothing of it)."""
    return ModelSettings(
        name=config.model, num_classes=num_classes, image_size=config.image_size, norm=config.norm,
        width=config.width, pretrained=config.pretrained,
    )  # fmt: skip


def module_of(config: RunConfig, num_classes: int, make_module: ModuleFactory | None = None) -> nn.Module:
    """The run's model, its weights drawn from the run's seed (or pretrained).

    Args:
        config: names the model.
        num_classes: how many outputs it has.
        make_module: makes the caller's own model instead.

    Returns:
        The module, on the CPU.

    Raises:
        ModelError: see `models.build.build`.
    """
    seed = Rng(config.seed).fork(purpose="init").seed
    if make_module is None:
        return build(model_settings(config, num_classes), seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_module(num_classes)


def bound_model_of(
    config: RunConfig, catalogue: Catalogue, *, device: DeviceName, make_module: ModuleFactory | None = None
) -> BoundModel:  # fmt: skip
    """A bound model with the run's model as `module_of` makes it."""
    compute = choose(device, threads=config.threads)
    module = module_of(config, len(catalogue), make_module)
    return BoundModel.of(
        module,
        compute=compute,
        settings=training_of(config),
        personal_names=personalization_of(config).personal_names(module),
    )


def training_of(config: RunConfig) -> TrainingSettings:
    """How clients train."""
    return TrainingSettings(
        optimizer=config.optimizer, momentum=config.momentum, weight_decay=config.weight_decay,
        label_smoothing=config.label_smoothing, gradient_clip=config.gradient_clip, batch_size=config.batch_size,
        local_epochs=config.local_epochs, augmentation=Augmentation() if config.augment else None,
        loss=component_of(config, "loss"),
    )  # fmt: skip


def pacing_of(config: RunConfig) -> Pacing:
    """What is made of machines that differ."""
    workload = Workload(
        rule=config.local_work, least=config.least_work, most=config.most_work, norm=config.work_norm,
        training=training_of(config),
    )  # fmt: skip
    return Pacing(
        straggler_factor=config.straggler_factor, over_selection=config.over_selection, workload=workload
    )  # fmt: skip


def open_setup(setup: Setup, *, device: DeviceName, make_module: ModuleFactory | None = None) -> OpenedSetup:
    """Build what a setup describes."""
    try:
        values = tomllib.loads(setup.config)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the server's configuration is not TOML: {error}") from None
    config = files.parse(RunConfig, values, where="the server's configuration")
    catalogue = Catalogue.from_json(setup.catalogue)
    bound_model = bound_model_of(config, catalogue, device=device, make_module=make_module)
    chosen = choose_forward(bound_model, config.image_size, config.compile)
    logger.debug("compiled: %s (%s)", chosen.compiled, chosen.reason)
    return OpenedSetup(
        setup=setup, config=config, catalogue=catalogue, algorithm=algorithm_of(config), bound_model=chosen.bound,
        uploads=uploads_of(config), personalization=personalization_of(config),
        batch_sizes=BatchSizes(chosen.bound) if config.dynamic_batch else None,
    )  # fmt: skip


def work_for(
    client: str, opened: OpenedSetup, photos: StorePhotos, *, batch_size: int | None = None,
    test: Callable[[], PhotoSet | None] = lambda: None, save: SaveModel = lambda opened, bound, comparison: None,
) -> Work:  # fmt: skip
    """One client's part in what was set up.

    Args:
        batch_size: another than configured, where clients have their own; None measures which is fastest.
        test: test photos, to compare models on in the end.
        keep: what becomes of the model that it chooses then.
    """
    bound, growth, scale = opened.bound_model, 1, 1.0
    if opened.batch_sizes is not None:
        size = batch_size or opened.batch_sizes.best_for(photos.train)
        growth, scale = size // bound.settings.batch_size, lr_scale(bound.settings, size)
        bound = replace(bound, settings=replace(bound.settings, batch_size=size))
    trainer = Trainer(
        bound_model=bound, client=client, rng=Rng(opened.config.seed), train=photos.train,
        validation=photos.validation, num_classes=len(opened.catalogue), phases=opened.personalization.phases,
        renews=isinstance(opened.algorithm, Asynchronous), growth=growth, lr_scale=scale,
    )  # fmt: skip
    ready = Ready(
        run_id=opened.setup.run_id,
        layout_digest=opened.bound_model.params.layout.digest,
        catalogue_digest=opened.catalogue.digest,
        config_digest=files.digest(opened.setup.config),
        num_train=len(photos.train),
        num_validation=len(photos.validation),
        num_left_out=photos.num_left_out,
    )
    return Work(
        algorithm=opened.algorithm,
        trainer=trainer,
        ready=ready,
        uploads=opened.uploads,
        personalization=opened.personalization,
        model_selection=ModelSelection(client_lr=client_lr_of(opened.config), test=test, save=partial(save, opened)),
    )


def store_photos(folder: Path, opened: OpenedSetup, cache: PhotoCache) -> StorePhotos:
    """A store's photos from its folder, decoded through the cache, split as the run says.

    Raises:
        DataError: there is no photo to train on: none can be decoded, or none is of a class in the catalogue.
    """
    config = opened.config
    found = scan(folder, val_fraction=config.val_fraction, seed=config.seed)
    train, validation = (
        load_photos(photos, opened.catalogue, cache, config.image_size, allow_empty=True)
        for photos in (found.train, found.validation)
    )
    problems = (*train.problems, *validation.problems)
    if not len(train.photo_set):
        raise DataError(
            none_usable(problems)
            if problems
            else "it holds no training photo of a class in the run's catalogue: its products are called "
            f"{some(train.left_out)}; give its folders the names that the other stores use"
        )
    num_left_out = sum((*train.left_out.values(), *validation.left_out.values()))
    return StorePhotos(train=train.photo_set, validation=validation.photo_set, num_left_out=num_left_out)


def scan_test_photos(folder: Path) -> PhotoFolder:
    """The photos of a --test-dir.

    Raises:
        DataError: it cannot be read, holds none, or holds photos to train on, too.
    """
    if has_split(folder):
        raise DataError(
            f"--test-dir '{folder}' has train/: give the folder of the test photos alone, such as its test/"
        )
    return scan(folder, val_fraction=0.0, seed=0)


def test_photos(folder: Path, config: RunConfig, catalogue: Catalogue, cache: PhotoCache) -> PhotoSet:
    """The server's test photos; those of classes that no client has are left out.

    Raises:
        DataError: no photo of the folder is of a class in the catalogue.
    """
    photos = load_photos(
        scan_test_photos(folder).train, catalogue, cache, config.image_size, allow_empty=True
    ).photo_set
    if not len(photos):
        raise DataError(f"--test-dir {folder}: none of its photos is of a class that the clients hold")
    return photos


def plan_of(
    config: RunConfig, *, run_id: str, start_clients: int, catalogue: Catalogue | None,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> Plan:  # fmt: skip
    """What the server is to do."""
    text, algorithm = files.for_clients(config), algorithm_of(config)
    return Plan(
        run_id=run_id,
        num_rounds=config.rounds + config.extend,
        start_clients=start_clients,
        fraction=config.fraction,
        rng=Rng(config.seed),
        client_lr=client_lr_of(config),
        rounds=RoundSettings(
            timeout=config.round_timeout, quorum=config.quorum, max_examples=config.max_examples,
            rejoin_grace=REJOIN_GRACE_SECONDS, equal_weights=config.sampling == "size",
        ),
        early_stopping=EarlyStopping(metric=config.best_metric, patience=config.patience),
        config=text,
        config_digest=files.digest(text),
        catalogue=catalogue,
        aliases=aliases,
        uploads=uploads_of(config),
        downloads=codec_policy_of(config, config.codec_down),
        sampling=config.sampling,
        aggregator=aggregator_of(config),
        max_staleness=algorithm.max_staleness if isinstance(algorithm, Asynchronous) else None,
        test_every=config.test_every,
        pacing=pacing_of(config),
        compares=config.personalize != "none" if config.compare is None else config.compare,
    )  # fmt: skip
