"""Noise comes from a cryptographic generator: it has the right distribution, and cannot be derived from the seed."""

import numpy as np
import pytest
import torch
from scipy import stats

from fedshelf.core.rng import Rng
from fedshelf.privacy.noise import KEY_BYTES, SecretRandom

KEY = bytes(range(KEY_BYTES))


def test_values_have_a_standard_normal_distribution() -> None:
    values = SecretRandom(KEY).normal(200_000).double().numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-4
    assert values.var() == pytest.approx(1, abs=0.02)
    assert np.corrcoef(values[:100_000], values[100_000:])[0, 1] == pytest.approx(0, abs=0.02)  # both of each pair


def test_uniform_values_fill_the_unit_interval() -> None:
    values = SecretRandom(KEY).uniform(100_000)
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_any_number_of_values_can_be_drawn(count: int) -> None:
    assert SecretRandom(KEY).normal(count).shape == (count,)


def test_generators_with_new_keys_draw_different_values() -> None:
    assert not torch.equal(SecretRandom().normal(10), SecretRandom().normal(10))


def test_the_same_key_draws_the_same_values_again() -> None:
    assert torch.equal(SecretRandom(KEY).normal(1001), SecretRandom(KEY).normal(1001))


def test_nothing_depends_on_the_seeds_of_other_generators() -> None:
    first = SecretRandom().normal(1000)
    torch.manual_seed(0)
    np.random.seed(0)
    seeded = torch.randn(1000, generator=Rng(0).fork(purpose="noise").torch())
    second = SecretRandom().normal(1000)
    assert (first - second).norm() == pytest.approx(2000**0.5, rel=0.1)
    assert (first - seeded).norm() == pytest.approx(2000**0.5, rel=0.1)


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes instead of 32"):
        SecretRandom(bytes(16))
