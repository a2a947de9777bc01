"""Noise of the stores: the published bound, what shares add up to, and what ε it is accounted for."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import ive

from fedshelf.compression.unit_ball import IntegerBall
from fedshelf.privacy.accounting import SampledGaussian, compose, noise_multiplier_for
from fedshelf.privacy.client_dp import NoisyMean
from fedshelf.privacy.distributed_dp import MOST_FACTOR, NoiseShares, renyi_divergence, variance_for
from fedshelf.privacy.noise import SecretRandom

BALL = IntegerBall.of(4096, 512)


def exact_divergence(order: int, shift: int, variance: float) -> float:
    """The Rényi divergence of Skellam noise and the same noise moved by `shift`, summed up in one dimension."""
    reach = int(14 * math.sqrt(variance) + 40 + 2 * order * shift)
    k = np.arange(-reach, reach + 1)
    log_p = np.log(np.maximum(ive(np.abs(k).astype(float), variance), 1e-320))
    log_q = np.log(np.maximum(ive(np.abs(k - shift).astype(float), variance), 1e-320))
    terms = order * log_p + (1 - order) * log_q
    keep = (log_p > -700) & (log_q > -700)
    largest = terms[keep].max()
    return float(largest + np.log(np.exp(terms[keep] - largest).sum())) / (order - 1)


@pytest.mark.parametrize("variance", [2.0, 10.0, 100.0, 2500.0])
@pytest.mark.parametrize("shift", [1, 3, 10])
@pytest.mark.parametrize("order", [2, 3, 8, 32])
def test_the_bound_is_above_the_exact_divergence_and_near_it(variance: float, shift: int, order: int) -> None:
    exact = exact_divergence(order, shift, variance)
    bound = renyi_divergence(order, squared_l2=shift**2, l1=shift, variance=variance)
    assert exact <= bound * (1 + 1e-9)
    if variance >= 100 and order * shift < variance / 10:
        assert bound < exact * 1.05
    calibrated = variance_for(1.5, shift**2)
    assert exact_divergence(order, shift, calibrated) <= order / (2 * 1.5**2) * (1 + 1e-9)


@pytest.mark.parametrize("multiplier", [0.05, 0.7, 3.0, 50.0])
@pytest.mark.parametrize("squared_norm", [1, 40, 10**6, 10**9])
def test_the_noise_is_worth_that_of_a_gaussian_with_its_multiplier(multiplier: float, squared_norm: int) -> None:
    """For every vector of integers of that norm, of which the sum of magnitudes is at most the squared norm."""
    variance = variance_for(multiplier, squared_norm)
    for order in (2, 3, 10, 200):
        bound = renyi_divergence(order, squared_l2=squared_norm, l1=squared_norm, variance=variance)
        assert bound <= order / (2 * multiplier**2) * (1 + 1e-12)
    assert variance >= multiplier**2 * squared_norm
    if squared_norm * multiplier**2 > 10**4:
        assert variance < multiplier**2 * squared_norm * 1.001, "the noise is larger than it needs to be"


def shares(
    count: int, *, threshold: int, members: int, mean: NoisyMean, size: int = 4096
) -> tuple[NDArray[np.int64], int]:  # fmt: skip
    """The sum of so many shares, as signed integers, and that of the count."""
    codes = np.zeros(size, np.uint32), np.zeros(0, np.uint32), np.zeros(6, np.uint64)
    for number in range(count):
        NoiseShares(mean).add(
            codes, BALL, num_members=members, threshold=threshold, source=SecretRandom(number.to_bytes(32, "big"))
        )
    assert not codes[2][1:].any()
    return codes[0].view(np.int32).astype(np.int64), int(codes[2].view(np.int64)[0])


@pytest.mark.parametrize(("members", "threshold"), [(3, 3), (6, 5), (9, 5)])
def test_any_threshold_of_shares_is_the_full_noise(members: int, threshold: int) -> None:
    mean = NoisyMean(noise_multiplier=1.2, clip_norm=1.0)
    full, allowed = variance_for(1.2, BALL.squared_norm), 5 * math.sqrt(2 / 4096)
    for count in (threshold - 1, threshold, members):
        values, _ = shares(count, threshold=threshold, members=members, mean=mean)
        assert values.var() / full == pytest.approx(count / threshold, rel=allowed)
    assert math.sqrt(full * members / threshold) <= 1.2 * MOST_FACTOR * math.sqrt(BALL.squared_norm)


def test_the_count_gets_noise_only_if_the_norm_adapts() -> None:
    fixed, adaptive = (
        NoisyMean(noise_multiplier=1.0, clip_norm=1.0, is_adaptive=is_adaptive) for is_adaptive in (False, True)
    )
    assert shares(3, threshold=3, members=3, mean=fixed)[1] == 0
    of_count = adaptive.deviations(3)[1]
    found = [
        shares(3, threshold=3, members=3, mean=NoisyMean(noise_multiplier=1 + 1e-9 * number, clip_norm=1.0,
               is_adaptive=True), size=number + 1)[1]
        for number in range(150)
    ]  # fmt: skip
    assert np.std(found) * 2.0**-32 == pytest.approx(of_count, rel=0.3)
    values, _ = shares(3, threshold=3, members=3, mean=adaptive)
    assert values.std() == pytest.approx(adaptive.deviations(3)[0] * math.sqrt(BALL.squared_norm), rel=0.06)


def test_shares_are_new_each_time() -> None:
    drawn = []
    for _ in range(2):
        codes = np.zeros(64, np.uint16), np.zeros(0, np.uint32), np.zeros(1, np.uint64)
        NoiseShares(NoisyMean(noise_multiplier=1.0, clip_norm=1.0)).add(codes, BALL, num_members=3, threshold=3)
        drawn.append(codes[0])
    assert not np.array_equal(drawn[0], drawn[1])


@pytest.mark.parametrize(("multiplier", "steps"), [(0.7, 1), (1.0, 10), (5.0, 100), (20.0, 5)])
def test_its_epsilon_is_that_of_the_published_bound_and_close_to_a_gaussians(multiplier: float, steps: int) -> None:
    """Against the conversion of Canonne et al. 2020 (proposition 12) of the bound itself, at whole orders."""
    delta, squared_norm = 1e-5, 10**6
    release = SampledGaussian(noise_multiplier=multiplier, steps=steps)
    found = compose([release], delta, unit="client", is_discrete=True)
    variance = variance_for(multiplier, squared_norm)
    published = min(
        steps * renyi_divergence(order, squared_l2=squared_norm, l1=squared_norm, variance=variance)
        + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        for order in (*range(2, 64), 128, 256, 512, 1024)
    )  # fmt: skip
    assert published <= found.epsilon <= published * 1.01
    gaussian = compose([release], delta, unit="client")
    assert gaussian.rdp <= found.epsilon < gaussian.rdp * 1.05
    assert found.pld is None
    assert gaussian.pld is not None
    assert gaussian.pld < found.epsilon, "the bound is of Rényi divergences alone, and the other one is tighter"


def test_noise_for_a_target_follows_the_same_accounting() -> None:
    noise = noise_multiplier_for(4.0, 1e-5, steps=20, is_discrete=True)
    release = SampledGaussian(noise_multiplier=noise, steps=20)
    assert 3.95 < compose([release], 1e-5, is_discrete=True).epsilon <= 4.0
    assert noise > noise_multiplier_for(4.0, 1e-5, steps=20)
