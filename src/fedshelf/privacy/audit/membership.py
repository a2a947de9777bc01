"""Membership inference: was a photo among those that a store trained on in a round?

Canaries:  Steinke et al. 2023 (`empirical_epsilon`): photos of the store with wrong labels, each put in or left out by
           a fair coin. Their score is how far the update moves the model along their own gradient, which whoever knows
           the model can compute. Wrong labels are hard to learn but by heart, so the attack is strong.
LiRA:      Carlini et al. 2022, "Membership Inference Attacks From First Principles", Algorithm 1, online, with shadow
           models that differ in a random half of the photos. Each shadow in turn is the target of the others.

Both train as the store does in one round, from the model that it received, with its settings and noise. Photos that are
left out are still drawn and then skipped, so that sampling rate and steps do not tell how many there are.

Shapes: N photos, M canaries, S shared values, T shared trainable values.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedshelf.core.messages import PARAMS, Broadcast, Purpose, TaskKey
from fedshelf.core.rng import Rng
from fedshelf.data.photo_set import PhotoSet
from fedshelf.privacy.audit.empirical_epsilon import EmpiricalEpsilon, confidence_interval, empirical_epsilon
from fedshelf.privacy.audit.step_update import Seal
from fedshelf.training.batches import Amount, Draw, batches
from fedshelf.training.cross_entropy import cross_entropy
from fedshelf.training.trainer import Trainer, logits

_LOW_RATE = 0.05  # of false alarms, at which LiRA's share of detections is reported
_MAX_VALUES = 1 << 17  # of a gradient that canaries are looked for in
_RIDGE = 0.1
_LEAST_DEVIATION = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class LikelihoodRatioAttack:
    """What LiRA found.

    Attributes:
        auc: probability that a photo that was in scores above one that was not; 0.5 is chance.
        true_positive_rate: share of the photos that were in and are found, with few false alarms.
        interval: of that share, with 95 % confidence as if all guesses were independent.
        false_positive_rate: the share of false alarms that is allowed.
        num_shadows: shadow models.
        num_guesses: photos times targets.
    """

    auc: float
    true_positive_rate: float
    interval: tuple[float, float]
    false_positive_rate: float
    num_shadows: int
    num_guesses: int


def wrongly_labeled(photos: PhotoSet, num_classes: int, count: int, rng: Rng) -> PhotoSet:
    """Up to `count` different copies of `photos` with wrong labels, drawn at random."""
    pairs = [(i, c) for i, label in enumerate(photos.labels) for c in range(num_classes) if c != label]
    chosen = rng.fork(purpose="canaries").python().sample(pairs, min(count, len(pairs)))
    index, labels = ([pair[part] for pair in chosen] for part in (0, 1))
    return PhotoSet(photos.images[index], np.array(labels, dtype=np.int64))


def audit_with_canaries(
    trainer: Trainer, canaries: PhotoSet, shared: Tensor, *, client_lr: float, delta: float, rng: Rng, seal: Seal
) -> EmpiricalEpsilon:  # fmt: skip
    """Train one round with about half of the canaries, and guess which.

    Args:
        trainer: the store's trainer, with noise or without.
        canaries: the canaries [M].
        shared: [S]: the model that the round starts from.
        client_lr: learning rate.
        delta: δ of the bound.
        rng: the auditor's coins.
        seal: what becomes of the upload on its way.
    """
    photos = together(trainer.train, canaries)
    is_in = _coins(rng.fork(purpose="coins"), len(canaries))
    with_canaries = replace(trainer, train=photos)
    mask = np.concatenate([np.ones(len(trainer.train), dtype=bool), is_in])
    update = _round(with_canaries, mask, shared, client_lr, seal)
    scores = shares(-update, torch.stack(list(_gradients(trainer, photos, shared))))[len(trainer.train) :]
    return empirical_epsilon(scores.tolist(), is_in.tolist(), delta=delta)


def likelihood_ratio_attack(
    trainer: Trainer, shared: Tensor, *, client_lr: float, num_shadows: int, rng: Rng, seal: Seal
) -> LikelihoodRatioAttack:  # fmt: skip
    """Train shadow models on random halves of the store's photos, and attack each with the others.

    Args:
        trainer: the store's trainer.
        shared: [S]: the model that the round starts from.
        client_lr: learning rate.
        num_shadows: shadow models, at least 8.
        rng: the auditor's coins.
        seal: what becomes of an upload on its way.
    """
    bound, photos = trainer.bound_model, trainer.train
    halves, confidences = [], []
    for number in range(num_shadows):
        mask = _coins(rng.fork(purpose="shadow", round=number), len(photos))
        varied = replace(trainer, rng=rng.fork(purpose="training", round=number))
        update = _round(varied, mask, shared, client_lr, seal)
        values = shared.clone()
        values[: len(update)] += update
        bound.load(values)
        logits_NK = torch.cat([found for found, _ in logits(bound, photos)]).double()
        halves.append(mask)
        confidences.append(_margins(logits_NK, torch.from_numpy(photos.labels)))
    bound.load(shared)
    is_in_SN, margins_SN = np.stack(halves), np.stack(confidences)
    scores, members = [], []
    for target in range(num_shadows):
        others = np.arange(num_shadows) != target
        inside, outside = (_gaussian(margins_SN[others], is_in_SN[others] == side) for side in (True, False))
        usable = (inside.counts >= 2) & (outside.counts >= 2)
        score_N = inside.log_density(margins_SN[target]) - outside.log_density(margins_SN[target])
        scores.append(score_N[usable])
        members.append(is_in_SN[target][usable])
    return _judged(np.concatenate(scores), np.concatenate(members), num_shadows)


def together(photos: PhotoSet, others: PhotoSet) -> PhotoSet:
    """Photos and others behind them."""
    return PhotoSet(
        np.concatenate([photos.images, others.images]), np.concatenate([photos.labels, others.labels])
    )  # fmt: skip


def only(draw: Draw, mask_N: NDArray[np.bool_]) -> Draw:
    """A `Draw` that skips the photos that are masked out."""

    def drawn(amount: Amount, generator: torch.Generator) -> Iterator[NDArray[np.int64]]:
        for chosen in draw(amount, generator):
            yield chosen[mask_N[chosen]]

    return drawn


def _round(trainer: Trainer, mask_N: NDArray[np.bool_], shared: Tensor, client_lr: float, seal: Seal) -> Tensor:
    """[T]: the update of one round on the photos of the mask; the bound model holds `shared` again afterwards."""
    bound = trainer.bound_model
    draw = only(trainer.draw, mask_N)
    if not trainer.is_private:
        least = 2 if bound.has_batch_norm else 1
        draw = _of_size(draw, least)
    before = bound.params.changing.clone()
    broadcast = Broadcast(
        key=TaskKey(run_id="audit", round=1, attempt=0), purpose=Purpose.TRAIN, client_lr=client_lr,
        vectors={PARAMS: shared},
    )  # fmt: skip
    try:
        delta = seal(replace(trainer, draw=draw).upload(broadcast)).delta
    finally:
        bound.params.changing.copy_(before)
        bound.load(shared)
    return delta[: bound.params.layout.num_trainable].clone()


def _of_size(draw: Draw, least: int) -> Draw:
    def drawn(amount: Amount, generator: torch.Generator) -> Iterator[NDArray[np.int64]]:
        yield from (chosen for chosen in draw(amount, generator) if len(chosen) >= least)

    return drawn


def _gradients(trainer: Trainer, photos: PhotoSet, shared: Tensor) -> Iterator[Tensor]:
    """The gradient of each photo at `shared`, with fixed statistics: the last values [V], with the output layer."""
    settings = replace(trainer.bound_model.settings, batch_size=1, augmentation=None)
    bound = trainer.having(settings).bound_model
    bound.load(shared)
    bound.module.eval()
    for number in range(len(photos)):
        one = PhotoSet(photos.images[number : number + 1], photos.labels[number : number + 1])
        (batch,) = batches(bound, one, trainer.rng, round=0, client="", epochs=1)
        bound.gradients.zero_()
        cross_entropy(bound.logits(batch.images), batch.labels, None, label_smoothing=0.0).backward()
        yield bound.gradients[: bound.params.layout.num_trainable][-_MAX_VALUES:].cpu().clone()
    bound.gradients.zero_()


def shares(update_T: Tensor, gradients_NV: Tensor) -> Tensor:
    """How much of each gradient is in an update: ridge regression on gradients of norm 1.

    Gradients have much in common; the regression tells what is due to each alone.

    Args:
        update_T: the update.
        gradients_NV: the gradients, at the last V of its values.

    Returns:
        A coefficient [N] for each gradient.
    """
    rows_NV = gradients_NV / (gradients_NV.norm(dim=1, keepdim=True) + 1e-12)
    gram_NN = rows_NV @ rows_NV.T
    strength = _RIDGE * gram_NN.diagonal().mean()
    shares_N: Tensor = torch.linalg.solve(
        (gram_NN + strength * torch.eye(len(gram_NN))).double(), (rows_NV @ update_T[-rows_NV.shape[1] :]).double()
    )  # fmt: skip
    return shares_N


def _coins(rng: Rng, count: int) -> NDArray[np.bool_]:
    return np.asarray(torch.randint(2, (count,), generator=rng.torch()).bool().numpy())


def _margins(logits_NK: Tensor, labels_N: Tensor) -> NDArray[np.float64]:
    """log(p / (1 - p)) of the probability of each photo's label: nearly Gaussian over shadow models."""
    own_N = logits_NK.gather(1, labels_N[:, None])[:, 0]
    rest_NK = logits_NK.scatter(1, labels_N[:, None], -torch.inf)
    return np.asarray((own_N - rest_NK.logsumexp(1)).cpu().numpy())


@dataclass(frozen=True, kw_only=True)
class _Gaussian:
    """A Gaussian for each photo.

    Attributes:
        counts: values that it was fitted to.
        means: their means.
        deviation: their standard deviation, over all photos.
    """

    counts: NDArray[np.int64]
    means: NDArray[np.float64]
    deviation: float

    def log_density(self, values_N: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(-((values_N - self.means) ** 2) / (2 * self.deviation**2) - np.log(self.deviation))


def _gaussian(values_SN: NDArray[np.float64], mask_SN: NDArray[np.bool_]) -> _Gaussian:
    counts = mask_SN.sum(0)
    means = np.where(mask_SN, values_SN, 0).sum(0) / np.maximum(1, counts)
    spread = np.where(mask_SN, (values_SN - means) ** 2, 0).sum() / max(1, (counts - 1).clip(0).sum())
    return _Gaussian(counts=counts, means=means, deviation=max(_LEAST_DEVIATION, float(spread) ** 0.5))


def _judged(scores: NDArray[np.float64], is_member: NDArray[np.bool_], num_shadows: int) -> LikelihoodRatioAttack:
    inside, outside = np.sort(scores[is_member]), np.sort(scores[~is_member])
    below = np.searchsorted(outside, inside, "left") + np.searchsorted(outside, inside, "right")
    threshold = outside[-1 - int(_LOW_RATE * len(outside))]
    found = int((inside > threshold).sum())
    return LikelihoodRatioAttack(
        auc=float(below.mean() / 2 / len(outside)), true_positive_rate=found / len(inside),
        interval=confidence_interval(found, len(inside)), false_positive_rate=_LOW_RATE, num_shadows=num_shadows,
        num_guesses=len(scores),
    )  # fmt: skip
