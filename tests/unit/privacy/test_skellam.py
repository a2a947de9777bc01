"""Skellam noise: moments, and every probability against scipy's."""

import math

import numpy as np
import pytest
from scipy.special import ive
from scipy.stats import chisquare, skellam

from fedshelf.privacy.noise import SecretRandom
from fedshelf.privacy.skellam import MAX_VARIANCE, Skellam, largest

KEY = bytes(range(32))
VARIANCES = [0.2, 3.0, 400.0, 1e5, 2e7]


@pytest.mark.parametrize("variance", VARIANCES)
def test_moments_are_those_of_the_distribution(variance: float) -> None:
    values = Skellam(variance).draw(200_000, SecretRandom(KEY)).astype(np.float64)
    deviation = math.sqrt(variance)
    assert abs(values.mean()) < 5 * deviation / math.sqrt(len(values))
    kurtosis = 3 + 1 / variance
    assert values.var() / variance == pytest.approx(1, abs=5 * math.sqrt((kurtosis - 1) / len(values)))


@pytest.mark.parametrize("variance", VARIANCES)
def test_frequencies_pass_a_chi_square_test(variance: float) -> None:
    """Against scipy's distribution function, in bins of equal probability."""
    values = Skellam(variance).draw(200_000, SecretRandom(KEY))
    edges = np.unique(skellam.ppf(np.linspace(0, 1, 41)[1:-1], variance / 2, variance / 2))
    expected = np.diff(np.concatenate([[0], skellam.cdf(edges, variance / 2, variance / 2), [1]]))
    observed = np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1)
    assert chisquare(observed, expected * len(values)).pvalue > 1e-4
    doubled = np.bincount(np.searchsorted(edges, np.rint(values * 1.02)), minlength=len(edges) + 1)
    if variance > 1000:
        assert chisquare(doubled, expected * len(values)).pvalue < 1e-4, "the test tells no other deviation apart"


@pytest.mark.parametrize("variance", VARIANCES)
def test_each_value_has_its_probability(variance: float) -> None:
    """The table against Bessel functions: the relative error is that of float64, or of 63 bits."""
    table = Skellam(variance)._sums
    magnitudes = np.unique(np.geomspace(1, largest(variance), 200).astype(int))
    exact = 2 * ive(magnitudes.astype(float), variance)
    found = np.diff(table)[magnitudes - 1].astype(np.float64) * 2.0**-63
    np.testing.assert_allclose(found, exact, rtol=1e-10, atol=2.0**-63)
    assert float(table[0]) * 2.0**-63 == pytest.approx(ive(0, variance), rel=1e-12)
    assert int(table[-1]) == 2**63


def test_the_same_key_draws_the_same_values_whatever_is_drawn_before() -> None:
    drawn = Skellam(50.0).draw(100_000, SecretRandom(KEY))
    Skellam(50.0).draw(10, SecretRandom(bytes(32)))
    np.testing.assert_array_equal(drawn, Skellam(50.0).draw(100_000, SecretRandom(KEY)))
    assert not np.array_equal(drawn, Skellam(50.0).draw(100_000, SecretRandom(bytes(32))))
    assert not np.array_equal(Skellam(50.0).draw(1000, SecretRandom()), Skellam(50.0).draw(1000, SecretRandom()))


def test_sums_have_the_distribution_of_the_sum_of_variances() -> None:
    source, share = SecretRandom(KEY), Skellam(4.0)
    values = np.sum([share.draw(100_000, source) for _ in range(6)], axis=0)
    exact = skellam.pmf(np.arange(-25, 26), 12.0, 12.0)
    observed = np.bincount(np.clip(values, -25, 25) + 25, minlength=51)
    assert chisquare(observed, exact / exact.sum() * len(values)).pvalue > 1e-4


@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan, 2 * MAX_VARIANCE])
def test_a_variance_without_a_table_is_an_error(variance: float) -> None:
    with pytest.raises(ValueError, match="is not above 0"):
        Skellam(variance)


def test_a_magnitude_is_exceeded_no_more_often_than_stated() -> None:
    for variance in (0.5, 30.0, 1e4):
        for log_tail in (1.0, 5.0, 20.0):
            bound = largest(variance, log_tail)
            assert skellam.sf(math.ceil(bound) - 1, variance / 2, variance / 2) <= math.exp(-log_tail)
