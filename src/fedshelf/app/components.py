"""Builds the parts of a run from its configuration: algorithm, stages, schedules, plan."""

import logging
import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any, cast

import torch

from fedshelf.algorithms.base import Algorithm, Asynchronous
from fedshelf.algorithms.reduce import Aggregator
from fedshelf.algorithms.registry import ALGORITHMS
from fedshelf.algorithms.ridge import Ridge
from fedshelf.algorithms.robust import AutoNormBound, NormBound, bounded
from fedshelf.compression.chain import parse
from fedshelf.compression.codec_policy import CodecPolicy
from fedshelf.compression.codec_stage import Encode
from fedshelf.compression.modular import Modular
from fedshelf.compression.sum_stage import EncodeSummand
from fedshelf.compression.unit_ball import UnitBall
from fedshelf.config import files
from fedshelf.config.families import FAMILIES
from fedshelf.config.schema import RunConfig
from fedshelf.core.params import Layout
from fedshelf.core.rng import Rng
from fedshelf.core.settings import load, settings_of
from fedshelf.core.stages import Stage
from fedshelf.data.augmentation import Augmentation
from fedshelf.data.catalogue import Catalogue, load_aliases
from fedshelf.personalization.base import Personalization
from fedshelf.privacy.accounting import noise_multiplier_for
from fedshelf.privacy.base import Noise, Protection
from fedshelf.privacy.client_dp import ClientDP, ClippedAtClient
from fedshelf.privacy.clipping import ADAPTIVE
from fedshelf.privacy.distributed_dp import MOST_DEVIATION, MOST_FACTOR
from fedshelf.privacy.dp_sgd import SampleDP
from fedshelf.privacy.homomorphic.settings import NOT_ENCRYPTED, Encryption
from fedshelf.privacy.homomorphic.upload_form import EncryptedForm
from fedshelf.privacy.policy import Policy
from fedshelf.privacy.policy_tables import ProtectionOffer
from fedshelf.privacy.private_ridge import PrivateRidge
from fedshelf.privacy.registry import STAGES
from fedshelf.privacy.secure_aggregation.settings import NO_MASK, Mask
from fedshelf.rounds.pipeline import UploadPipeline
from fedshelf.rounds.plan import Plan, RoundSettings
from fedshelf.scheduling.early_stopping import EarlyStopping
from fedshelf.scheduling.work_assignment import Pacing
from fedshelf.scheduling.workload import Workload
from fedshelf.training.bound_model import BoundModel, TrainingSettings
from fedshelf.training.distillation import Distillation
from fedshelf.training.optimizer import client_lr

logger = logging.getLogger(__name__)

MOST_WEIGHT = 100_000.0
"""The largest weight of an upload that is one of a sum; one of more photos weighs as much."""
REJOIN_GRACE_SECONDS = 120.0  # a store's computer may take this long to start Python and reconnect


def component_of(config: RunConfig, family: str) -> Any:
    """Create the component of `family` that the run has chosen, with its settings."""
    return config.settings_of(load(FAMILIES[family][getattr(config, family)]))


def optional_components(config: RunConfig, registry: Mapping[str, str]) -> list[Any]:
    """Create the components of `registry` whose first setting the run has set, with their settings.

    A setting that the chosen component of a family has, too, is meant for that one.
    """
    chosen = [load(components[getattr(config, family)]) for family, components in FAMILIES.items()]
    taken = {setting.key for component in chosen for setting in settings_of(component).values()}
    switches = {component: next(iter(settings_of(component).values())) for component in map(load, registry.values())}
    return [
        config.settings_of(component)
        for component, switch in switches.items()
        if switch.key not in taken and getattr(config, switch.key)
    ]


def algorithm_of(config: RunConfig) -> Algorithm:
    """Create the configured algorithm (client and server half)."""
    algorithm = cast(Algorithm, component_of(config, "algorithm"))
    protection = protection_of(config)
    if isinstance(algorithm, Ridge) and isinstance(protection, SampleDP):
        return PrivateRidge(exact=algorithm, dimensions=protection.projection, seed=config.seed)
    return algorithm


def closed_form_of(config: RunConfig) -> Algorithm | None:
    """Create what computes the output layer in closed form before or after the rounds, if the run does that."""
    wanted = config.warm_start != "none" or config.refit_head
    return cast(Algorithm, config.settings_of(load(ALGORITHMS["ridge"]))) if wanted else None


def aggregator_of(config: RunConfig) -> Aggregator:
    """Create the configured aggregator, with its norm bound."""
    aggregator = cast(Aggregator, component_of(config, "aggregator"))
    if algorithm_of(config).sums:
        return aggregator
    stages = [stage.declares for stage in uploads_of(config).stages]
    hiding = [one.setting for one in stages if one.masks] + [f"--codec-up {config.codec_up}"] * bool(
        summed_codec_of(config)
    )
    if config.norm_bound == "off" or hiding:
        if config.norm_bound == "auto":
            logger.info("--norm-bound auto is off: with %s the server sees no single upload", hiding[0])
        return aggregator
    return bounded(aggregator, AutoNormBound() if config.norm_bound == "auto" else NormBound(float(config.norm_bound)))


def personalization_of(config: RunConfig) -> Personalization:
    """Create the configured personalization."""
    return cast(Personalization, component_of(config, "personalize"))


def protection_of(config: RunConfig) -> Protection:
    """Create the configured differential privacy."""
    return cast(Protection, component_of(config, "dp"))


def mask_of(config: RunConfig) -> Mask:
    """The configured masks of uploads; off by default."""
    found = (stage for stage in optional_components(config, STAGES) if isinstance(stage, Mask))
    return next(found, NO_MASK)


def encryption_of(config: RunConfig) -> Encryption:
    """The configured homomorphic encryption of uploads; off by default."""
    found = (stage for stage in optional_components(config, STAGES) if isinstance(stage, Encryption))
    return next(found, NOT_ENCRYPTED)


def encrypted_form_of(config: RunConfig, bound: BoundModel) -> EncryptedForm | None:
    """The form of encrypted uploads; None without encryption.

    Args:
        config: the run's configuration.
        bound: its model.

    Raises:
        UsageError: see `EncryptedForm.of`.
    """
    encryption, encode = encryption_of(config), uploads_of(config).summand
    if not encryption.is_on or encode is None:
        return None
    return EncryptedForm.of(encryption, encode, bound.params.layout, bound.output_layer)


def hides_uploads(config: RunConfig) -> bool:
    """Whether the server sees no upload by itself."""
    return mask_of(config).is_on or encryption_of(config).is_on


def has_noise_of_stores(config: RunConfig) -> bool:
    """Whether stores add noise, so that nothing else may be computed from photos and sent."""
    protection = protection_of(config)
    return isinstance(protection, SampleDP) or (isinstance(protection, ClientDP) and protection.noise_at == "stores")


def is_sampling_secret(config: RunConfig) -> bool:
    """Whether nobody but the server learns who takes part in a round: under masks, members know each other's names."""
    return not mask_of(config).is_on


def client_noise_of(config: RunConfig, protection: ClientDP) -> float:
    """The noise multiplier of a run with --dp client.

    Raises:
        BudgetError: no noise is enough for the target.
        UsageError: `dp-accounting` is not installed.
    """
    if protection.noise_multiplier is not None:
        return protection.noise_multiplier
    rate = config.fraction if is_sampling_secret(config) else 1.0
    target, is_discrete = protection.target_epsilon or math.inf, protection.noise_at == "stores"
    return _noise_for(target, protection.delta, rate, config.rounds, is_discrete)


@lru_cache(maxsize=8)
def _noise_for(target: float, delta: float, rate: float, steps: int, is_discrete: bool) -> float:
    return noise_multiplier_for(target, delta, sampling_rate=rate, steps=steps, is_discrete=is_discrete)


def clip_of(config: RunConfig) -> ClippedAtClient | None:
    """What scales a client's uploads down, if the server cannot; None if it can, or nothing does."""
    protection = protection_of(config)
    if not isinstance(protection, ClientDP) or summed_codec_of(config) is None:
        return None
    return ClippedAtClient(clip_norm=protection.clip_norm, noise_at=protection.noise_at)


def _unit_ball_of(config: RunConfig) -> UnitBall | None:
    protection = protection_of(config)
    if not isinstance(protection, ClientDP):
        return None
    noise = (lambda: MOST_FACTOR * client_noise_of(config, protection)) if protection.noise_at == "stores" else float
    return UnitBall(has_within=protection.clip_norm == ADAPTIVE, noise=noise, most_deviation=MOST_DEVIATION)


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
    if (codec := summed_codec_of(config)) is not None:
        stages.append(_summand_of(config, codec))
    elif not policy.is_plain:
        stages.append(Encode(policy=policy))
    return UploadPipeline(stages=tuple(sorted(stages, key=lambda stage: stage.declares.position)))


def summed_codec_of(config: RunConfig) -> Modular | None:
    """The codec of uploads that are decoded as a sum only; None if each is decoded by itself."""
    if config.byte_budget is not None:
        return None
    chain = parse(config.codec_up)
    codec, alone = chain.quantizer, chain.sparsifier is None and chain.lossless is None
    return codec if alone and isinstance(codec, Modular) and (hides_uploads(config) or not codec.range) else None


def weighs_by_examples(config: RunConfig) -> bool:
    """Whether uploads weigh by their number of photos: with --dp client, all weigh alike."""
    is_private = isinstance(protection_of(config), ClientDP)
    return algorithm_of(config).weighs_examples and config.weights == "examples" and not is_private


def _summand_of(config: RunConfig, codec: Modular) -> EncodeSummand:
    algorithm = algorithm_of(config)

    def vectors(layout: Layout) -> dict[str, tuple[int, torch.dtype]]:
        return {name: (spec.size, getattr(torch, spec.dtype)) for name, spec in algorithm.vectors(layout).items()}

    weighs = weighs_by_examples(config)
    return EncodeSummand(
        codec=codec, vectors=vectors, rng=Rng(config.seed), max_weight=MOST_WEIGHT if weighs else 1.0,
        unit_ball=_unit_ball_of(config),
        weight=(lambda upload: algorithm.weight(upload, staleness=0)) if weighs else lambda upload: 1.0,
    )  # fmt: skip


def training_of(config: RunConfig) -> TrainingSettings:
    """Return the clients' training settings."""
    return TrainingSettings(
        optimizer=config.optimizer, momentum=config.momentum, weight_decay=config.weight_decay,
        label_smoothing=config.label_smoothing, gradient_clip=config.gradient_clip, batch_size=config.batch_size,
        local_epochs=config.local_epochs, augmentation=Augmentation() if config.augment else None,
        loss=component_of(config, "loss"), backbone_lr_factor=config.backbone_lr_factor,
        head_lr_factor=config.head_lr_factor, unfreeze_after=config.unfreeze_after,
        distillation=distillation_of(config),
    )  # fmt: skip


def distillation_of(config: RunConfig) -> Distillation | None:
    """How much stores learn from the run's teacher; None if there is none."""
    if config.teacher_digest is None:
        return None
    return Distillation(weight=config.distill_weight, temperature=config.temperature)


def most_epochs(config: RunConfig) -> int:
    """The largest number of epochs of any phase of local training."""
    return max(value for name, value in config if name.endswith("epochs") and isinstance(value, int))


def offer_of(config: RunConfig) -> ProtectionOffer:
    """What the run does to updates before they leave a store."""
    protection = protection_of(config)
    return (
        ProtectionOffer(kind="sample-dp", delta=protection.delta)
        if isinstance(protection, Noise) and protection.unit == "photo"
        else ProtectionOffer(
            kind="secagg" if mask_of(config).is_on else "he" if encryption_of(config).is_on else "none"
        )
    )


def compares(config: RunConfig) -> bool:
    """Whether stores compare models after the last round."""
    return config.personalize != "none" if config.compare is None else config.compare


def check_setup(policy: Policy, config: RunConfig) -> None:
    """Check a run's configuration against a store's policy.

    Raises:
        PolicyError: lists all that is not allowed.
    """
    algorithm = algorithm_of(config)
    policy.check_setup(
        model=config.model, image_size=config.image_size, threads=config.threads, epochs=most_epochs(config),
        offer=offer_of(config), sums=algorithm.counts_photos,
        weighs_examples=algorithm.weighs_examples and config.weights == "examples",
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
            rejoin_grace=REJOIN_GRACE_SECONDS, equal_weights=config.sampling == "size" or config.weights == "equal",
        ),
        early_stopping=early_stopping_of(config),
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
        compares=compares(config),
        threshold=mask_of(config).threshold,
        evaluates=not (has_noise_of_stores(config) or encryption_of(config).is_on),
        encryption=encryption_of(config),
    )  # fmt: skip


def early_stopping_of(config: RunConfig) -> EarlyStopping:
    """Create what chooses the best round: with noise at the server, nothing that stores report without noise."""
    metric, is_private = config.best_metric, protection_of(config).unit == "client"
    if is_private and metric == "auto":
        metric = "central_accuracy"
    newest = algorithm_of(config).sums or (is_private and config.test_dir is None)
    return EarlyStopping(metric=metric, patience=config.patience, newest=newest)


def given_names(config: RunConfig) -> tuple[dict[str, str], Catalogue | None]:
    """Load the aliases and the catalogue from the files that `config` names, if any.

    Raises:
        DataError: a file cannot be read, or the two contradict each other.
    """
    aliases = load_aliases(config.aliases) if config.aliases else {}
    catalogue = Catalogue.load(config.catalogue) if config.catalogue else None
    return aliases, catalogue.with_aliases(aliases) if catalogue and aliases else catalogue
