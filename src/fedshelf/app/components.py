"""Builds all objects except transports from the configuration."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from fedshelf.algorithms.base import Algorithm, Asynchronous
from fedshelf.algorithms.reduce import Aggregator
from fedshelf.algorithms.registry import ALGORITHMS
from fedshelf.algorithms.robust import AutoNormBound, NormBound, bounded
from fedshelf.compression.chain import parse
from fedshelf.compression.codec_policy import CodecPolicy
from fedshelf.compression.codec_stage import Encode
from fedshelf.compression.download import name_of
from fedshelf.config import files
from fedshelf.config.families import FAMILIES
from fedshelf.config.schema import RunConfig
from fedshelf.core.choices import DeviceName
from fedshelf.core.errors import DataError, RefusedError
from fedshelf.core.messages import Comparison, Ready, Setup
from fedshelf.core.rng import Rng
from fedshelf.core.settings import load, settings_of
from fedshelf.core.stages import Stage
from fedshelf.core.text import some
from fedshelf.data.augmentation import Augmentation
from fedshelf.data.cache import PhotoCache, none_usable
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.dataset import load_photos, warn_of_left_out
from fedshelf.data.folder import PhotoFolder, has_split, scan
from fedshelf.data.photo_set import PhotoSet
from fedshelf.models.adapters import add_adapters
from fedshelf.models.build import ModelSettings, build
from fedshelf.models.trainable import frozen_names
from fedshelf.personalization.base import Personalization
from fedshelf.personalization.model_selection import ModelSelection
from fedshelf.privacy.registry import STAGES
from fedshelf.rounds.client import Work
from fedshelf.rounds.pipeline import UploadPipeline
from fedshelf.rounds.plan import Plan, RoundSettings
from fedshelf.scheduling.early_stopping import EarlyStopping
from fedshelf.scheduling.work_assignment import Pacing
from fedshelf.scheduling.workload import Workload
from fedshelf.training.batch_size import BatchSizes, lr_scale
from fedshelf.training.bound_model import BoundModel, TrainingSettings
from fedshelf.training.compiled import compile_forward
from fedshelf.training.device import choose
from fedshelf.training.features import featurized
from fedshelf.training.loop import Run, alone
from fedshelf.training.optimizer import client_lr
from fedshelf.training.trainer import Trainer

logger = logging.getLogger(__name__)

MAX_RUN_ID_CHARACTERS = 200
FEATURES = "features"  # folder of the photo cache
REJOIN_GRACE_SECONDS = 120.0  # a store's computer may take this long to start Python and reconnect

ModuleFactory = Callable[[int], nn.Module]
"""Creates a module for a number of classes: the caller's own model instead of a named one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StorePhotos:
    """A store's photos.

    Attributes:
        train: photos to train on.
        validation: photos to validate on.
        num_left_out: number of photos whose class is not in the catalogue.
    """

    train: PhotoSet
    validation: PhotoSet
    num_left_out: int = 0


_NONE = PhotoSet(np.empty((0, 1, 1, 3), np.uint8), np.empty(0, np.int64))
NO_PHOTOS = StorePhotos(train=_NONE, validation=_NONE)


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedSetup:
    """The objects of a setup, shared by all clients of a process.

    Attributes:
        setup: the setup.
        config: the run's configuration.
        catalogue: the classes.
        algorithm: the federated algorithm.
        bound_model: the model.
        uploads: the stages that an upload passes through.
        personalization: what stays at the stores.
        closed_form: computes the output layer in closed form, if the run does that before or after its rounds.
        batch_sizes: measures the fastest batch size if each client has its own, else None.
    """

    setup: Setup
    config: RunConfig
    catalogue: Catalogue
    algorithm: Algorithm
    bound_model: BoundModel
    uploads: UploadPipeline
    personalization: Personalization
    closed_form: Algorithm | None = None
    batch_sizes: BatchSizes | None = None


SaveModel = Callable[[OpenedSetup, BoundModel, Comparison], None]
"""Saves the model that a store has chosen, which is in the bound model."""


def component_of(config: RunConfig, family: str) -> Any:
    """Create the component of `family` that the run has chosen, with its settings."""
    return config.settings_of(load(FAMILIES[family][getattr(config, family)]))


def optional_components(config: RunConfig, registry: Mapping[str, str]) -> list[Any]:
    """Create the components of `registry` whose first setting the run has set, with their settings."""
    switches = {component: next(iter(settings_of(component).values())) for component in map(load, registry.values())}
    return [config.settings_of(component) for component, switch in switches.items() if getattr(config, switch.key)]


def algorithm_of(config: RunConfig) -> Algorithm:
    """Create the configured algorithm (client and server half)."""
    return cast(Algorithm, component_of(config, "algorithm"))


def closed_form_of(config: RunConfig) -> Algorithm | None:
    """Create what computes the output layer in closed form before or after the rounds, if the run does that."""
    wanted = config.warm_start != "none" or config.refit_head
    return cast(Algorithm, config.settings_of(load(ALGORITHMS["ridge"]))) if wanted else None


def aggregator_of(config: RunConfig) -> Aggregator:
    """Create the configured aggregator, with its norm bound."""
    aggregator = cast(Aggregator, component_of(config, "aggregator"))
    if algorithm_of(config).sums:
        return aggregator
    masked = [stage.declares.setting for stage in uploads_of(config).stages if stage.declares.masks]
    if config.norm_bound == "off" or masked:
        if config.norm_bound == "auto":
            logger.info("--norm-bound auto is off: with %s the server sees no single upload", masked[0])
        return aggregator
    return bounded(aggregator, AutoNormBound() if config.norm_bound == "auto" else NormBound(float(config.norm_bound)))


def personalization_of(config: RunConfig) -> Personalization:
    """Create the configured personalization."""
    return cast(Personalization, component_of(config, "personalize"))


def client_lr_of(config: RunConfig) -> Callable[[int], float]:
    """Return the learning rate of local training as a function of the round."""
    return partial(
        client_lr, base=config.client_lr, schedule=config.lr_schedule, warmup_rounds=config.warmup_rounds,
        num_rounds=config.rounds,
    )  # fmt: skip


def codec_policy_of(config: RunConfig, codec: str) -> CodecPolicy:
    """Create the codec policy of one direction; each direction gets half of the byte budget.

    Args:
        config: the run's configuration.
        codec: codecs joined by "+".

    Returns:
        The policy.

    Raises:
        UsageError: `codec` is invalid.
    """
    budget = None if config.byte_budget is None else int(config.byte_budget * 1_000_000 / 2)
    return CodecPolicy(codec=parse(codec), byte_budget=budget, rng=Rng(config.seed))


def uploads_of(config: RunConfig) -> UploadPipeline:
    """Create the stages that an upload passes through, on both sides, in the order of their positions."""
    policy = codec_policy_of(config, config.codec_up)
    stages: list[Stage] = optional_components(config, STAGES)
    stages += [] if policy.is_plain else [Encode(policy=policy)]
    return UploadPipeline(stages=tuple(sorted(stages, key=lambda stage: stage.declares.position)))


def model_settings(config: RunConfig, num_classes: int) -> ModelSettings:
    """Return the settings of the configured model for `num_classes`.

    Pretrained weights concern only the server: clients receive them, and the clients' configuration does not mention
    them.
    """
    return ModelSettings(
        name=config.model, num_classes=num_classes, image_size=config.image_size, norm=config.norm,
        width=config.width, pretrained=config.pretrained, digest=config.model_digest,
    )  # fmt: skip


def module_of(config: RunConfig, num_classes: int, make_module: ModuleFactory | None = None) -> nn.Module:
    """Create the run's model with weights drawn from the run's seed, or pretrained ones.

    Args:
        config: names the model.
        num_classes: number of outputs.
        make_module: creates the caller's own model instead.

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


def trainable_module_of(
    config: RunConfig, num_classes: int, make_module: ModuleFactory | None = None
) -> tuple[nn.Module, frozenset[str]]:  # fmt: skip
    """Create the module of `module_of`, with adapters if these are trained.

    Args:
        config: names the model, and what is trained.
        num_classes: number of outputs.
        make_module: creates the caller's own model instead.

    Returns:
        The module, and the names of its tensors that never change.

    Raises:
        ModelError: see `models.build.build`; or the model lacks the layers that are to be trained.
    """
    module = module_of(config, num_classes, make_module)
    if config.train == "adapter":
        seed = Rng(config.seed).fork(purpose="adapter").seed
        add_adapters(module, rank=config.adapter_rank, alpha=config.adapter_alpha, seed=seed)
    return module, frozen_names(module, config.train, freeze_norm=config.freeze_norm)


def bound_model_of(
    config: RunConfig, catalogue: Catalogue, *, device: DeviceName, make_module: ModuleFactory | None = None
) -> BoundModel:  # fmt: skip
    """Create a bound model from `trainable_module_of`.

    Args:
        config: the run's configuration.
        catalogue: the classes.
        device: the device to compute on.
        make_module: creates the caller's own model instead.

    Returns:
        The bound model.

    Raises:
        ModelError: see `trainable_module_of`.
    """
    compute = choose(device, threads=config.threads)
    module, frozen = trainable_module_of(config, len(catalogue), make_module)
    return BoundModel.of(
        module,
        compute=compute,
        settings=training_of(config),
        personal_names=personalization_of(config).personal_names(module),
        frozen_names=frozen,
        on_features=config.train == "head",
    )


def training_of(config: RunConfig) -> TrainingSettings:
    """Return the clients' training settings."""
    return TrainingSettings(
        optimizer=config.optimizer, momentum=config.momentum, weight_decay=config.weight_decay,
        label_smoothing=config.label_smoothing, gradient_clip=config.gradient_clip, batch_size=config.batch_size,
        local_epochs=config.local_epochs, augmentation=Augmentation() if config.augment else None,
        loss=component_of(config, "loss"), backbone_lr_factor=config.backbone_lr_factor,
        unfreeze_after=config.unfreeze_after,
    )  # fmt: skip


def pacing_of(config: RunConfig) -> Pacing:
    """Return how rounds handle clients of different speed."""
    workload = Workload(
        rule=config.local_work, least=config.least_work, most=config.most_work, norm=config.work_norm,
        training=training_of(config),
    )  # fmt: skip
    return Pacing(
        straggler_factor=config.straggler_factor, over_selection=config.over_selection, workload=workload
    )  # fmt: skip


def open_setup(
    setup: Setup, *, device: DeviceName, make_module: ModuleFactory | None = None,
    accept: Callable[[RunConfig], None] = lambda config: None,
) -> OpenedSetup:  # fmt: skip
    """Build the objects that a setup describes.

    Args:
        setup: the setup.
        device: the device to compute on.
        make_module: creates the caller's own model, if there is one.
        accept: called with the configuration before anything is built; may refuse it.

    Returns:
        The objects.

    Raises:
        RefusedError: the server's configuration cannot be read, or is refused.
    """
    if len(setup.run_id) > MAX_RUN_ID_CHARACTERS:
        raise RefusedError(f"the run's id has {len(setup.run_id):,} characters; {MAX_RUN_ID_CHARACTERS} is the most")
    config = files.from_a_server(setup.config)
    accept(config)
    catalogue = Catalogue.from_json(setup.catalogue)
    bound_model = bound_model_of(config, catalogue, device=device, make_module=make_module)
    _load_frozen(bound_model, setup)
    if config.compile == "on":
        bound_model = compile_forward(bound_model, config.image_size)
    layout, closed_form = bound_model.params.layout, closed_form_of(config)
    return OpenedSetup(
        setup=setup, config=config, catalogue=catalogue, bound_model=bound_model,
        algorithm=algorithm_of(config).for_model(layout, bound_model.output_layer),
        closed_form=None if closed_form is None else closed_form.for_model(layout, bound_model.output_layer),
        uploads=uploads_of(config), personalization=personalization_of(config),
        batch_sizes=BatchSizes(bound_model) if config.dynamic_batch else None,
    )  # fmt: skip


def _load_frozen(bound: BoundModel, setup: Setup) -> None:
    """Load the values that never change.

    Raises:
        RefusedError: they are not those that the setup names, or do not fit the model.
    """
    given, wanted = setup.frozen_values, len(bound.params.frozen)
    if given is None:
        if wanted:
            raise RefusedError(f"the setup comes without the {wanted:,} frozen values of this model")
        return
    if len(given) != wanted or name_of(given) != setup.frozen:
        raise RefusedError(f"the setup's {len(given):,} frozen values are not the {wanted:,} that it names")
    bound.params.frozen.copy_(given)


def work_for(
    client: str, opened: OpenedSetup, photos: StorePhotos, *, batch_size: int | None = None, training: Run = alone,
    features_folder: Path | None = None,
    test: Callable[[], PhotoSet | None] = lambda: None, save: SaveModel = lambda opened, bound, comparison: None,
    per_product: bool = True,
) -> Work:  # fmt: skip
    """Create the work of one client.

    Args:
        client: the client's name.
        opened: the setup's objects.
        photos: the client's photos.
        batch_size: batch size, if clients have their own; None measures the fastest.
        training: trains the model.
        features_folder: folder in which features of photos are kept; None keeps none.
        test: returns the test photos on which models are compared at the end.
        save: saves the model that the client chooses then.
        per_product: whether the client counts by product, if it is asked to.

    Returns:
        The work.
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
        run=training,
        features_folder=features_folder,
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
        closed_form=opened.closed_form,
        trainer=trainer,
        ready=ready,
        uploads=opened.uploads,
        personalization=opened.personalization,
        catalogue=opened.catalogue if per_product else None,
        model_selection=ModelSelection(client_lr=client_lr_of(opened.config), test=test, save=partial(save, opened)),
    )


def store_photos(folder: Path, opened: OpenedSetup, cache: PhotoCache, *, store: str) -> StorePhotos:
    """Load a store's photos through the cache and split them as configured.

    Args:
        folder: the store's folder.
        opened: the setup's objects.
        cache: the cache of decoded photos.
        store: the store's name, for warnings.

    Returns:
        The photos.

    Raises:
        DataError: no photo can be decoded, or none belongs to a class in the catalogue.
    """
    config = opened.config
    found = scan(folder, val_fraction=config.val_fraction, seed=config.seed)
    train, validation = (
        load_photos(photos, opened.catalogue, cache, config.image_size, allow_empty=True)
        for photos in (found.train, found.validation)
    )
    left_out = Counter(train.left_out) + Counter(validation.left_out)
    warn_of_left_out(left_out, opened.catalogue, whose=store)
    problems = (*train.problems, *validation.problems)
    if not len(train.photo_set):
        raise DataError(
            none_usable(problems)
            if problems
            else "it holds no training photo of a class in the run's catalogue: its products are called "
            f"{some(train.left_out)}; give its folders the names that the other stores use"
        )
    bound, sets = opened.bound_model, [train.photo_set, validation.photo_set]
    if bound.head is not None:
        sets = [featurized(bound, s, cache=cache.root / FEATURES, views=config.feature_views) for s in sets]
    return StorePhotos(train=sets[0], validation=sets[1], num_left_out=left_out.total())


def scan_test_photos(folder: Path) -> PhotoFolder:
    """Scan the photos of a --test-dir.

    Raises:
        DataError: the folder cannot be read, is empty, or also contains training photos.
    """
    if has_split(folder):
        raise DataError(
            f"--test-dir '{folder}' has train/: give the folder of the test photos alone, such as its test/"
        )
    return scan(folder, val_fraction=0.0, seed=0)


def test_photos(
    folder: Path, config: RunConfig, catalogue: Catalogue, cache: PhotoCache, bound: BoundModel
) -> PhotoSet:  # fmt: skip
    """Load the server's test photos, without those whose class no client has; as features if the model takes these.

    Args:
        folder: the test folder.
        config: the run's configuration.
        catalogue: the classes.
        cache: the cache of decoded photos.
        bound: the model, with its frozen values loaded.

    Returns:
        The photos.

    Raises:
        DataError: no photo belongs to a class in the catalogue.
    """
    loaded = load_photos(scan_test_photos(folder).train, catalogue, cache, config.image_size, allow_empty=True)
    warn_of_left_out(Counter(loaded.left_out), catalogue, whose="--test-dir")
    if not len(loaded.photo_set):
        raise DataError(f"--test-dir {folder}: none of its photos is of a class that the clients hold")
    photos = loaded.photo_set
    return photos if bound.head is None else featurized(bound, photos, cache=cache.root / FEATURES)


def plan_of(
    config: RunConfig, *, run_id: str, start_clients: int, catalogue: Catalogue | None,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> Plan:  # fmt: skip
    """Create the server's plan.

    Args:
        config: the run's configuration.
        run_id: the run's id.
        start_clients: number of clients that must join before round 1.
        catalogue: the classes, if they are given.
        aliases: class names by alias.

    Returns:
        The plan.
    """
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
        early_stopping=EarlyStopping(metric=config.best_metric, patience=config.patience, newest=algorithm.sums),
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
        confirmed=config.confirm_catalogue,
        closed_form=closed_form_of(config),
        warm_start=config.warm_start != "none",
        refit_head=config.refit_head,
        average_rounds=config.average_rounds,
        compares=config.personalize != "none" if config.compare is None else config.compare,
    )  # fmt: skip
