"""Attacks a store's own updates, with protection and without, and reports what was found."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedshelf.app.audit.subject import AuditSubject
from fedshelf.app.audit.targets import Target, targets_of_probe, targets_of_run
from fedshelf.app.differential_privacy import delta_of, noisy_mean_of, released
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import ModelError, TrainingError
from fedshelf.core.messages import Mechanism
from fedshelf.core.rng import Rng
from fedshelf.core.text import counted
from fedshelf.data.photo_set import PhotoSet
from fedshelf.privacy.accounting import SampledGaussian, as_release, compose
from fedshelf.privacy.audit import label_inference
from fedshelf.privacy.audit.findings import (
    AuditReport,
    CanaryFinding,
    LabelFinding,
    MembershipFinding,
    ModelRole,
    Reconstruction,
)
from fedshelf.privacy.audit.image_similarity import best_matches, psnr, ssim
from fedshelf.privacy.audit.inversion import STEPS, InversionSettings, Inverted, as_pictures, invert
from fedshelf.privacy.audit.membership import audit_with_canaries, likelihood_ratio_attack, wrongly_labeled
from fedshelf.privacy.audit.rare_products import rare_products
from fedshelf.privacy.audit.step_update import StepUpdate, named, step_update
from fedshelf.privacy.audit.store_canaries import audit_store_noise
from fedshelf.privacy.dp_sgd import num_steps, sampling_rate

logger = logging.getLogger(__name__)

MAX_PHOTOS = 500  # besides the canaries, whose gradients are held at once
LEAST_CANARIES = 8
SMOOTHNESS: Mapping[ModelRole, float] = {"probe": 3e-3, "run": 0.1}
"""Weight of smoothness in an inversion. Gradients of ReLU nets say less of a photo, so the attack guesses more."""
STEP_LR = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditOptions:
    """How much is attacked.

    Attributes:
        num_photos: photos of the inverted step.
        inversion_steps: iterations of an inversion.
        num_canaries: canaries.
        num_stores: stores whose sum is attacked.
        least_stores: number of stores below which a product is rare.
        num_shadows: shadow models of LiRA.
        seed: seed of the choice of photos and canaries, and of the attacks.
    """

    num_photos: int = 1
    inversion_steps: int = STEPS
    num_canaries: int = 200
    num_stores: int = 8
    least_stores: int = 3
    num_shadows: int = 16
    seed: int = 0


def audit(subject: AuditSubject, options: AuditOptions) -> AuditReport:
    """Attack the updates of a store.

    Args:
        subject: the store's photos, model and settings.
        options: how much is attacked.

    Returns:
        What was found.

    Raises:
        TrainingError: the run's model diverged in a round.
    """
    opened, config, left_out = subject.opened, subject.opened.config, list[str]()
    rng = Rng(options.seed).fork(purpose="audit", client=subject.store)
    run_targets = list(targets_of_run(subject, left_out))
    probe_targets = targets_of_probe(subject, left_out)
    targets = [*probe_targets, *run_targets]
    chosen = rng.fork(purpose="photos").python().sample(range(len(subject.pixels)), len(subject.pixels))
    reconstructions = list(_reconstructions(targets, chosen, options, left_out))
    num_parameters = counted(opened.bound_model.params.layout.num_parameters, "parameter")
    counts = dict.fromkeys((options.num_photos, min(config.batch_size, len(chosen))))
    labels = [finding for target in targets for n in counts if (finding := _label_finding(target, chosen[:n]))]
    return AuditReport(
        store=subject.store, run_id=opened.setup.run_id,
        model=f"{config.model} ({num_parameters}), {subject.origin}",
        settings=f"{config.optimizer} with momentum {config.momentum:g}, batch size {config.batch_size}, "
        f"{counted(config.local_epochs, 'local epoch')}, {counted(config.rounds, 'round')}, --dp {config.dp}",
        reconstructions=tuple(reconstructions), chance_ssim=_chance(probe_targets[0], chosen),
        labels=tuple(labels), canaries=tuple(_canaries(targets, config, options, rng, left_out)),
        store_canaries=tuple(_store_canaries(subject, options, rng)),
        membership=tuple(_membership(run_targets, config, options, rng, left_out)),
        rare_products=None if subject.products is None
        else rare_products(subject.products, least=options.least_stores),
        least_stores=options.least_stores, left_out=tuple(dict.fromkeys(left_out)),
    )  # fmt: skip


def _reconstructions(
    targets: list[Target], chosen: list[int], options: AuditOptions, left_out: list[str]
) -> Iterator[Reconstruction]:  # fmt: skip
    for target in targets:
        settings = InversionSettings(
            steps=options.inversion_steps, total_variation=SMOOTHNESS[target.model], seed=options.seed
        )  # fmt: skip
        if target.trainer.train.images.ndim == 3:
            left_out.append(
                "Gradient inversion of the run's own model: it trains its output layer on features, and no gradient of "
                "a pixel leaves. The features of a photo that is alone in its batch can be read off (label inference)."
            )
            continue
        photos = _some(target.trainer.train, chosen[: options.num_photos])
        try:
            update = _update(target, photos)
        except TrainingError as error:
            left_out.append(f"Gradient inversion of {counted(len(photos), 'photo')} in the run's own model: {error}.")
            continue
        logger.info("inverting a gradient of the %s model, protection: %s", target.model, target.protection)
        yield _reconstruction(target, update, _inverted(target, update, settings), settings)
        if target.protection == "none":
            yield from _of_a_sum(target, update, chosen, options, settings)


def _of_a_sum(
    target: Target, update: StepUpdate, chosen: list[int], options: AuditOptions, settings: InversionSettings
) -> Iterator[Reconstruction]:  # fmt: skip
    """The same inversion where only a sum over stores is seen. Only of the probe: it takes as long for each store."""
    count = min(options.num_stores, len(chosen) // options.num_photos)
    if target.model != "probe" or count < 2:
        return
    photos = [
        _some(target.trainer.train, chosen[start * options.num_photos : (start + 1) * options.num_photos])
        for start in range(count)
    ]
    updates = [_update(target, some) for some in photos]
    summed = StepUpdate(
        gradient=torch.stack([one.gradient for one in updates]).mean(0),
        images=torch.cat([one.images for one in updates]), labels=torch.cat([one.labels for one in updates]),
    )  # fmt: skip
    logger.info("inverting the sum of %s", counted(count, "store"))
    found = _inverted(target, summed, settings, num_stores=count)
    of_sum = replace(target, protection=f"secure aggregation: only the sum of {counted(count, 'store')} is seen")
    yield _reconstruction(of_sum, summed, found, settings)


def _inverted(
    target: Target, update: StepUpdate, settings: InversionSettings, *, num_stores: int = 1
) -> Inverted:  # fmt: skip
    """Invert an update of a target's model."""
    target.bound.load(target.shared)
    return invert(
        target.bound, update.gradient, update.labels, size=update.images.shape[-1], settings=settings,
        num_stores=num_stores,
    )  # fmt: skip


def _reconstruction(
    target: Target, update: StepUpdate, found: Inverted, settings: InversionSettings
) -> Reconstruction:  # fmt: skip
    originals = as_pictures(target.bound, update.images)
    matches = best_matches(originals, found.images)
    pictures = found.images[[index for index, _ in matches]]
    signal = [psnr(one, other) for one, other in zip(originals, pictures, strict=True)]
    return Reconstruction(
        model=target.model, protection=target.protection, ssim=sum(value for _, value in matches) / len(matches),
        psnr=sum(signal) / len(signal), distance=found.distance, steps=settings.steps, seconds=found.seconds,
        originals=originals, pictures=pictures,
    )  # fmt: skip


def _update(target: Target, photos: PhotoSet) -> StepUpdate:
    """One step of a target. Its learning rate only scales the update."""
    return step_update(target.trainer, photos, target.shared, client_lr=STEP_LR, seal=target.seal)


def _label_finding(target: Target, chosen: list[int]) -> LabelFinding | None:
    """Infer labels; None if the model has no single linear output layer that leaves the store."""
    try:
        update = _update(target, _some(target.trainer.train, chosen))
    except TrainingError:  # the inversion of the same photos has said so
        return None
    weight, bias = label_inference.head_gradient(target.bound, named(target.bound, update.gradient))
    if weight is None or bias is None:
        return None
    found, count = label_inference.infer_labels(bias, len(chosen)), len(chosen)
    return LabelFinding(
        model=target.model, protection=target.protection, num_photos=count,
        num_right=label_inference.num_right(found, update.labels),
        chance=label_inference.by_chance(update.labels, len(bias)),
        features_error=_features_error(target, update, weight, bias) if count == 1 else None,
    )  # fmt: skip


def _features_error(target: Target, update: StepUpdate, weight: Tensor, bias: Tensor) -> float | None:
    """The relative error of the features that are read off; None where photos do not determine them."""
    if target.bound.has_batch_norm:
        return None
    try:
        features = update.images[0] if update.images.dim() == 2 else target.bound.features(update.images)[0]
        features = features[: weight.shape[1]]  # without the figures of sales
    except ModelError:
        return None
    return float((label_inference.infer_features(weight, bias) - features).norm() / features.norm())


def _canaries(
    targets: list[Target], config: RunConfig, options: AuditOptions, rng: Rng, left_out: list[str]
) -> Iterator[CanaryFinding]:  # fmt: skip
    delta = delta_of(config)
    for target in targets:
        photos = target.trainer.train
        subset = sorted(rng.fork(purpose="subset").python().sample(range(len(photos)), min(len(photos), MAX_PHOTOS)))
        trainer = replace(target.trainer, train=_some(photos, subset))
        num_classes = trainer.num_classes or 0
        canaries = wrongly_labeled(trainer.train, num_classes, options.num_canaries, rng)
        if len(canaries) < LEAST_CANARIES:
            left_out.append(f"Canaries: {len(canaries)} of at least {LEAST_CANARIES} can be made of these photos.")
            return
        logger.info(
            "training with %s in the %s model, protection: %s", counted(len(canaries), "canary", "canaries"),
            target.model, target.protection,
        )  # fmt: skip
        found = audit_with_canaries(
            trainer, canaries, target.shared, client_lr=config.client_lr, delta=delta, rng=rng, seal=target.seal
        )
        finding = CanaryFinding(model=target.model, protection=target.protection, found=found)
        if target.noise is not None:
            mechanism = _mechanism(target, config, len(trainer.train) + len(canaries), target.noise)
            finding = replace(finding, accounted=compose([as_release(mechanism)], delta).epsilon)
        yield finding


def _store_canaries(subject: AuditSubject, options: AuditOptions, rng: Rng) -> Iterator[CanaryFinding]:
    """The noise on the sum, of a run with --dp client."""
    config, layout = subject.opened.config, subject.opened.bound_model.params.layout
    noisy_mean, delta = noisy_mean_of(config), delta_of(config)
    if noisy_mean is None:
        return
    found = audit_store_noise(
        noisy_mean, num_canaries=options.num_canaries, num_values=layout.num_shared, delta=delta, rng=rng
    )
    noise, is_shared = noisy_mean.noise_multiplier, noisy_mean.noise_at == "stores"
    release = SampledGaussian(noise_multiplier=noise)
    yield CanaryFinding(
        model="run", protection=f"--dp client, noise {noise:.3g}" + ", of the stores" * is_shared, found=found,
        accounted=compose([release], delta, unit="client", is_discrete=is_shared).epsilon,
    )  # fmt: skip


def _mechanism(target: Target, config: RunConfig, num_photos: int, noise: float) -> Mechanism:
    """What one round of a target releases."""
    if target.model == "run":
        return released(config, num_photos, noise)
    settings = target.bound.settings
    return Mechanism(
        noise_multiplier=noise, sampling_rate=sampling_rate(num_photos, settings.batch_size),
        steps=num_steps(num_photos, settings.batch_size, settings.local_epochs),
    )  # fmt: skip


def _membership(
    targets: list[Target], config: RunConfig, options: AuditOptions, rng: Rng, left_out: list[str]
) -> Iterator[MembershipFinding]:  # fmt: skip
    if not targets or targets[0].bound.head is None:
        left_out.append("LiRA: shadow models are cheap only where a run trains its output layer alone (--train head).")
        return
    for target in targets:
        logger.info("training shadow heads, protection: %s", target.protection)
        found = likelihood_ratio_attack(
            target.trainer, target.shared, client_lr=config.client_lr, num_shadows=options.num_shadows, rng=rng,
            seal=target.seal,
        )  # fmt: skip
        yield MembershipFinding(protection=target.protection, found=found)


def _chance(target: Target, chosen: list[int]) -> float:
    """The mean similarity of the first photo and up to 20 others."""
    photos = _some(target.trainer.train, chosen[:21])
    pictures = torch.from_numpy(photos.images.copy()).permute(0, 3, 1, 2).float() / 255
    others = [ssim(pictures[0], other) for other in pictures[1:]]
    return sum(others) / len(others) if others else 0.0


def _some(photos: PhotoSet, chosen: list[int]) -> PhotoSet:
    return PhotoSet(photos.images[chosen], photos.labels[chosen])
