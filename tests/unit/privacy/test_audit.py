"""Attacks on a store's updates find what is known to be there, and not what noise hides."""

import io
import math
import random
import tarfile
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor, nn

from fedshelf.core.rng import Rng
from fedshelf.data.photo_set import PhotoSet
from fedshelf.models.resnet import resnet10
from fedshelf.privacy.accounting import SampledGaussian, compose, noise_multiplier_for
from fedshelf.privacy.audit import label_inference
from fedshelf.privacy.audit.empirical_epsilon import confidence_interval, empirical_epsilon, lower_bound
from fedshelf.privacy.audit.image_similarity import MAX_PSNR, best_matches, psnr, ssim
from fedshelf.privacy.audit.inversion import InversionSettings, Inverted, as_pictures, invert
from fedshelf.privacy.audit.membership import audit_with_canaries, likelihood_ratio_attack, only, wrongly_labeled
from fedshelf.privacy.audit.probe import PLAIN, probe_model
from fedshelf.privacy.audit.rare_products import RareProduct, rare_products
from fedshelf.privacy.audit.step_update import StepUpdate, named, step_update
from fedshelf.privacy.audit.store_canaries import audit_store_noise
from fedshelf.privacy.client_dp import NoiseAt, NoisyMean
from fedshelf.privacy.dp_sgd import PrivateTraining, num_steps, poisson, sampling_rate
from fedshelf.training.batches import Amount, shuffled
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.settings import TrainingSettings
from fedshelf.training.trainer import Trainer
from tests import worlds
from tests.unit.data.samples import GROCERIES_SMALL, needs_groceries_small, pixels

CLASSES = 6
EPSILON, DELTA = 8.0, 1e-5


def smooth_photos(count: int, size: int) -> PhotoSet:
    labels = np.arange(count) % CLASSES
    return PhotoSet(np.stack([pixels(seed, size, size) for seed in range(count)]), labels)


def trainer(bound: BoundModel, photos: PhotoSet, *, noise: float | None = None, num_classes: int = CLASSES) -> Trainer:
    private: dict[str, Any] = {}
    if noise is not None:
        private = {"run": PrivateTraining(noise_multiplier=noise, clip_norm=1.0), "draw": poisson, "is_private": True}
    return Trainer(
        bound_model=bound, client="lyon", rng=Rng(0), train=photos, validation=worlds.photos(0, 0),
        num_classes=num_classes, **private,
    )  # fmt: skip


def update_of(bound: BoundModel, photos: PhotoSet, **given: Any) -> StepUpdate:
    return step_update(trainer(bound, photos, **given), photos, bound.params.shared.clone(), client_lr=0.05)


def inverted(bound: BoundModel, update: StepUpdate, *, steps: int, num_stores: int = 1) -> tuple[Inverted, Tensor]:
    size = update.images.shape[-1]
    found = invert(
        bound, update.gradient, update.labels, size=size, settings=InversionSettings(steps=steps), num_stores=num_stores
    )
    return found, as_pictures(bound, update.images)


def test_equal_pictures_have_a_similarity_of_one_and_unlike_ones_have_less() -> None:
    one, other = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    assert ssim(one, one) == pytest.approx(1)
    assert psnr(one, one) == MAX_PSNR
    assert ssim(one, other) == ssim(other, one) < 0.1
    assert psnr(torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.1)) == pytest.approx(20)


def test_similarity_is_that_of_the_paper() -> None:
    """Of flat pictures only luminance is compared; of two windows, the formula is computed by hand."""
    flat, brighter = torch.full((3, 15, 15), 0.2), torch.full((3, 15, 15), 0.6)
    assert ssim(flat, brighter) == pytest.approx((2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4), abs=1e-4)
    one, other = torch.rand(2, 1, 11, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    profile = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(profile, profile) / profile.sum() ** 2
    x, y = one[0].numpy(), other[0].numpy()
    mx, my = (weights * x).sum(), (weights * y).sum()
    vx, vy, c = ((weights * (a - ma) * (b - mb)).sum() for a, ma, b, mb in
                 ((x, mx, x, mx), (y, my, y, my), (x, mx, y, my)))  # fmt: skip
    expected = (2 * mx * my + 1e-4) * (2 * c + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert ssim(one.float(), other.float()) == pytest.approx(expected, abs=1e-4)


def test_pictures_of_a_batch_are_matched_whatever_their_order() -> None:
    originals = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    assert [index for index, _ in best_matches(originals, originals[[2, 0, 1]])] == [1, 2, 0]


@pytest.mark.parametrize(
    "settings",
    [
        PLAIN, replace(PLAIN, momentum=0.9, weight_decay=0.01),
        replace(PLAIN, momentum=0.5, head_lr_factor=3.0, backbone_lr_factor=0.5),
    ],
)  # fmt: skip
def test_the_gradient_is_read_off_the_update(settings: TrainingSettings) -> None:
    bound, photos = replace(probe_model(CLASSES, size=8), settings=settings), smooth_photos(1, 8)
    before = bound.params.vector.clone()
    update = update_of(bound, photos)
    assert torch.equal(bound.params.vector, before), "the model is as it was"
    loss = nn.functional.cross_entropy(bound.module(update.images), update.labels)
    true = torch.autograd.grad(loss, list(bound.module.parameters()))
    for gradient, found in zip(true, named(bound, update.gradient).values(), strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=2e-5)


def test_a_photo_is_reconstructed_from_its_gradient_and_not_with_noise() -> None:
    photos = smooth_photos(1, 16)
    bound = probe_model(CLASSES, size=16)
    noise = noise_multiplier_for(EPSILON, DELTA, sampling_rate=16 / 300, steps=1000)
    found, (original,) = inverted(bound, update_of(bound, photos), steps=160)
    noisy, _ = inverted(bound, update_of(bound, photos, noise=noise), steps=160)
    assert ssim(original, found.images[0]) >= 0.8
    assert ssim(original, noisy.images[0]) <= 0.2
    assert found.distance < 1e-3 < 0.1 < noisy.distance


def test_scaling_an_update_protects_nothing() -> None:
    bound, photos = probe_model(CLASSES, size=8), smooth_photos(1, 8)
    update = update_of(bound, photos)
    clipped = replace(update, gradient=update.gradient / 1024)
    first, second = (inverted(bound, each, steps=20)[0].images for each in (update, clipped))
    torch.testing.assert_close(first, second, atol=1e-3, rtol=0)


def test_the_photos_of_a_sum_are_sought_together_also_with_batch_normalization() -> None:
    """Each store normalizes by its own photos, and statistics are as before."""
    photos = smooth_photos(2, 32)
    bound = worlds.bound_model(resnet10(CLASSES, width=2, norm="batch"), PLAIN)
    updates = [update_of(bound, PhotoSet(photos.images[i : i + 1], photos.labels[i : i + 1])) for i in range(2)]
    summed = StepUpdate(
        gradient=(updates[0].gradient + updates[1].gradient) / 2, images=torch.cat([u.images for u in updates]),
        labels=torch.cat([u.labels for u in updates]),
    )  # fmt: skip
    before = bound.params.vector.clone()
    found, originals = inverted(bound, summed, steps=5, num_stores=2)
    assert found.images.shape == originals.shape == (2, 3, 32, 32)
    assert torch.equal(bound.params.vector, before)


@needs_groceries_small
@pytest.mark.real_data
@pytest.mark.long
@pytest.mark.parametrize("number", [3, 60, 150, 250])
def test_a_real_photo_is_reconstructed_and_not_with_noise(number: int) -> None:
    with tarfile.open(GROCERIES_SMALL) as archive:
        members = [each for each in archive.getmembers() if "/train/" in each.name and each.name.endswith(".jpg")]
        content = archive.extractfile(members[number])
        assert content is not None
        picture = Image.open(io.BytesIO(content.read())).convert("RGB").resize((32, 32), Image.Resampling.BOX)
    photos = PhotoSet(np.array(picture)[None], np.array([number // 25]))
    bound = probe_model(12)
    noise = noise_multiplier_for(EPSILON, DELTA, sampling_rate=16 / 300, steps=1140)
    found, (original,) = inverted(bound, update_of(bound, photos), steps=2000)
    noisy, _ = inverted(bound, update_of(bound, photos, noise=noise), steps=2000)
    assert ssim(original, found.images[0]) >= 0.8
    assert ssim(original, noisy.images[0]) <= 0.2


def head_gradients(update: StepUpdate, bound: BoundModel) -> tuple[Tensor, Tensor]:
    weight, bias = label_inference.head_gradient(bound, named(bound, update.gradient))
    assert weight is not None
    assert bias is not None
    return weight, bias


def test_the_label_and_the_features_of_a_single_photo_are_read_off_exactly() -> None:
    photos, bound = smooth_photos(CLASSES, 16), probe_model(CLASSES, size=16)
    for number in range(CLASSES):
        update = update_of(bound, PhotoSet(photos.images[number : number + 1], photos.labels[number : number + 1]))
        weight, bias = head_gradients(update, bound)
        assert label_inference.infer_labels(bias, 1) == {number: 1}
        features = bound.features(update.images)[0]
        torch.testing.assert_close(label_inference.infer_features(weight, bias), features, rtol=1e-3, atol=1e-4)


def test_the_labels_of_a_batch_are_counted() -> None:
    photos, bound = smooth_photos(12, 16), probe_model(CLASSES, size=16)
    chosen = [0, 6, 0, 1, 1, 7, 2, 8]  # of classes 0, 0, 0, 1, 1, 1, 2, 2
    update = update_of(bound, PhotoSet(photos.images[chosen], photos.labels[chosen]))
    found = label_inference.infer_labels(head_gradients(update, bound)[1], len(chosen))
    assert found.total() == len(chosen)
    right = label_inference.num_right(found, update.labels) / len(chosen)
    assert right >= 7 / 8 > label_inference.by_chance(update.labels, CLASSES)


def test_without_a_bias_rows_are_summed_and_without_a_shared_output_layer_nothing_is_inferred() -> None:
    bound = worlds.bound_model(nn.Sequential(nn.Flatten(), nn.Sigmoid(), nn.Linear(3 * 16, CLASSES, bias=False)))
    photos = smooth_photos(1, 4)
    weight, sums = head_gradients(update_of(bound, photos), bound)
    assert torch.equal(sums, weight.sum(1))
    assert label_inference.infer_labels(sums, 1) == {int(photos.labels[0]): 1}
    assert label_inference.head_gradient(bound, {}) == (None, None)


def paper_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """The code of appendix D of Steinke et al. 2023."""
    q = 1 / (1 + math.exp(-epsilon))
    beta = stats.binom.sf(v - 1, r, q)
    alpha, total = 0.0, 0.0
    for i in range(1, v + 1):
        total = total + stats.binom.pmf(v - i, r, q)
        if total > i * alpha:
            alpha = total / i
    return float(min(beta + alpha * delta * 2 * m, 1))


@pytest.mark.parametrize(("m", "r", "v"), [(100, 100, 100), (100, 60, 50), (1000, 500, 400), (50, 50, 26)])
def test_the_bound_is_that_of_the_paper_s_code(m: int, r: int, v: int) -> None:
    bound = lower_bound(m, r, v, DELTA, 0.05)
    if bound:
        assert paper_p_value(m, r, v, bound, DELTA) == pytest.approx(0.05, rel=1e-6)
    else:
        assert paper_p_value(m, r, v, 0.0, DELTA) > 0.05


@pytest.mark.parametrize(("right", "count"), [(0, 10), (3, 10), (10, 10), (120, 200)])
def test_the_interval_is_that_of_clopper_and_pearson(right: int, count: int) -> None:
    exact = stats.binomtest(right, count).proportion_ci(0.95, method="exact")
    assert confidence_interval(right, count) == pytest.approx((exact.low, exact.high), abs=1e-9)


@pytest.mark.parametrize("count", [8, 50, 200])
def test_perfect_guesses_reach_the_ceiling_and_wrong_ones_show_nothing(count: int) -> None:
    is_in = [bool(number % 2) for number in range(count)]
    found = empirical_epsilon([float(each) for each in is_in], is_in, delta=DELTA)
    assert found.epsilon == found.ceiling > 0
    assert found.num_right_of_all == count
    assert empirical_epsilon([-float(each) for each in is_in], is_in, delta=DELTA).epsilon == 0


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0])
def test_the_bound_exceeds_epsilon_no_more_often_than_it_may(epsilon: float) -> None:
    """Randomized response tells each coin with exactly this epsilon: no attack on it is better than guessing it."""
    draw, above, runs = random.Random(0), 0, 200
    for _ in range(runs):
        is_in = [draw.random() < 0.5 for _ in range(100)]
        scores = [each if draw.random() < 1 / (1 + math.exp(-epsilon)) else not each for each in is_in]
        found = empirical_epsilon([score + 1e-3 * draw.random() for score in scores], is_in, delta=0.0)
        above += found.epsilon > epsilon
        assert found.epsilon <= found.ceiling
    assert above / runs <= 0.05


def canaries_in(noise: float | None, seed: int) -> tuple[float, float, float]:
    """The empirical epsilon of one round, its ceiling, and the accountant's."""
    photos = smooth_photos(24, 8)
    settings = replace(PLAIN, batch_size=8, local_epochs=2)
    bound = replace(probe_model(CLASSES, size=8), settings=settings)
    canaries = wrongly_labeled(photos, CLASSES, 100, Rng(seed))
    found = audit_with_canaries(
        trainer(bound, photos, noise=noise), canaries, bound.params.shared.clone(), client_lr=0.05, delta=DELTA,
        rng=Rng(seed), seal=lambda upload: upload,
    )  # fmt: skip
    if noise is None:
        return found.epsilon, found.ceiling, math.inf
    count = len(photos) + len(canaries)
    release = SampledGaussian(
        noise_multiplier=noise, sampling_rate=sampling_rate(count, 8), steps=num_steps(count, 8, 2)
    )  # fmt: skip
    return found.epsilon, found.ceiling, compose([release], DELTA).epsilon


def test_canaries_are_found_without_noise() -> None:
    found, ceiling, _ = canaries_in(None, seed=0)
    assert 0.5 < found <= ceiling


@pytest.mark.parametrize("noise", [0.4, 1.0, 2.0])
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 20))])
def test_the_empirical_epsilon_never_exceeds_the_accountant_s(noise: float, seed: int) -> None:
    found, ceiling, accounted = canaries_in(noise, seed)
    assert found <= min(ceiling, accounted)


def store_canaries(
    noise: float, seed: int, *, is_adaptive: bool = False, noise_at: NoiseAt = "server"
) -> tuple[float, float]:  # fmt: skip
    """The empirical epsilon of a noisy mean of stores, and the accountant's."""
    noisy_mean = NoisyMean(noise_multiplier=noise, clip_norm=0.3, is_adaptive=is_adaptive, noise_at=noise_at)
    found = audit_store_noise(
        noisy_mean, num_canaries=400, num_values=4000, delta=DELTA, rng=Rng(seed), key=bytes(32)
    )  # fmt: skip
    return found.epsilon, compose([SampledGaussian(noise_multiplier=noise)], DELTA, unit="client").epsilon


@pytest.mark.parametrize("is_adaptive", [False, True], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0])
def test_canary_stores_show_no_more_than_the_accountant_allows(noise: float, is_adaptive: bool) -> None:
    for seed in range(5):
        found, accounted = store_canaries(noise, seed, is_adaptive=is_adaptive)
        assert found <= accounted


@pytest.mark.parametrize("noise_at", ["server", "stores"])
def test_canary_stores_are_found_where_the_noise_is_weak(noise_at: NoiseAt) -> None:
    found, accounted = store_canaries(0.5, seed=0, noise_at=noise_at)
    assert 1 < found <= accounted
    assert store_canaries(1e-3, seed=0, noise_at=noise_at)[0] > 3
    assert store_canaries(20.0, seed=0, noise_at=noise_at)[0] < 1


def test_canaries_have_wrong_labels_and_none_is_there_twice() -> None:
    photos = smooth_photos(5, 8)
    canaries = wrongly_labeled(photos, CLASSES, 1000, Rng(0))
    assert len(canaries) == 5 * (CLASSES - 1)
    keys = [(image.tobytes(), int(label)) for image, label in zip(canaries.images, canaries.labels, strict=True)]
    true = {image.tobytes(): int(label) for image, label in zip(photos.images, photos.labels, strict=True)}
    assert len(set(keys)) == len(keys)
    assert all(true[image] != label for image, label in keys)


@pytest.mark.parametrize("draw", [poisson, shuffled])
def test_photos_that_are_left_out_are_never_drawn_and_change_no_number_of_steps(draw: Any) -> None:
    mask, amount = np.arange(40) % 2 == 0, Amount(40, 8, 3)
    drawn = list(only(draw, mask)(amount, torch.Generator()))
    assert len(drawn) == len(list(draw(amount, torch.Generator()))) == 15
    assert {int(index) for chosen in drawn for index in chosen} <= set(range(0, 40, 2))


def test_shadow_heads_tell_what_a_head_was_trained_on() -> None:
    """Random labels can only be learned by heart: what was trained on is then known by its confidence."""
    draw = np.random.default_rng(0)
    photos = PhotoSet(draw.normal(size=(30, 1, 40)).astype(np.float32), draw.integers(0, CLASSES, 30))
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 40), nn.Linear(40, CLASSES))
    settings = replace(PLAIN, batch_size=8, local_epochs=10)
    frozen = [name for name, _ in module.named_parameters() if name.startswith("1.")]
    bound = BoundModel.of(
        module, compute=worlds.bound_model().compute, settings=settings, frozen_names=frozen, on_features=True
    )  # fmt: skip
    shared = bound.params.shared.clone()

    def attacked(noise: float | None) -> float:
        return likelihood_ratio_attack(
            trainer(bound, photos, noise=noise), shared, client_lr=0.3, num_shadows=8, rng=Rng(1),
            seal=lambda upload: upload,
        ).auc  # fmt: skip

    assert attacked(None) > 0.9
    assert attacked(20.0) < 0.65


def test_products_of_few_stores_are_listed_rarest_first() -> None:
    products = {"oslo": ["milk", "tea", "salt"], "lyon": ["milk", "tea"], "bern": ["milk", "jam"]}
    assert rare_products(products, least=3) == (
        RareProduct(product="jam", stores=("bern",)), RareProduct(product="salt", stores=("oslo",)),
        RareProduct(product="tea", stores=("lyon", "oslo")),
    )  # fmt: skip
    assert rare_products(products, least=1) == ()
