"""The ε of releases with noise: reference values, composition, calibration, and what the library lacks."""

import json
import math
import sys
from dataclasses import replace
from typing import Any

import dp_accounting as dp
import pytest
from dp_accounting import pld, rdp

from fedshelf.core.errors import BudgetError, UsageError
from fedshelf.privacy import epsilon
from fedshelf.privacy.accounting import SampledGaussian, compose, noise_multiplier_for

DELTA = 1e-5
REFERENCE = SampledGaussian(noise_multiplier=1.1, sampling_rate=0.05, steps=1000)


def gaussian(noise_multiplier: float, steps: int = 1) -> SampledGaussian:
    return SampledGaussian(noise_multiplier=noise_multiplier, steps=steps)


def analytic(noise_multiplier: float, delta: float) -> float:
    """Balle and Wang 2018, "Improving the Gaussian Mechanism for Differential Privacy", theorem 8."""

    def normal_cdf(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    def delta_of(epsilon: float) -> float:
        half, shift = 1 / (2 * noise_multiplier), epsilon * noise_multiplier
        return normal_cdf(half - shift) - math.exp(epsilon) * normal_cdf(-half - shift)

    low, high = 0.0, 100.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle) > delta else (low, middle)
    return high


def event(release: SampledGaussian) -> dp.DpEvent:
    sampled = dp.PoissonSampledDpEvent(release.sampling_rate, dp.GaussianDpEvent(release.noise_multiplier))
    return dp.SelfComposedDpEvent(sampled, release.steps)


def test_epsilon_equals_the_reference_values() -> None:
    guarantee = compose([REFERENCE], DELTA)
    assert guarantee.pld == pytest.approx(9.192, abs=1e-3)
    assert guarantee.rdp == pytest.approx(10.015, abs=1e-3)
    assert guarantee.epsilon == guarantee.pld


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize("noise", [0.5, 1.0, 3.0, 30.0])
def test_a_single_noisy_sum_has_the_epsilon_of_the_analytic_gaussian_mechanism(noise: float, delta: float) -> None:
    found = compose([gaussian(noise)], delta).pld
    assert found == pytest.approx(analytic(noise, delta), rel=1e-4, abs=1e-6)
    assert compose([gaussian(noise * 5, steps=25)], delta).pld == pytest.approx(found, rel=1e-9)


def test_releases_of_several_runs_equal_one_composed_event_list() -> None:
    releases = [
        REFERENCE,
        gaussian(4.0),
        SampledGaussian(noise_multiplier=2.0, sampling_rate=0.1, steps=300),
        REFERENCE,
    ]
    events = dp.ComposedDpEvent([event(release) for release in releases])
    guarantee = compose(releases, DELTA)
    assert guarantee.pld == pytest.approx(pld.PLDAccountant().compose(events).get_epsilon(DELTA), rel=1e-3)
    assert guarantee.rdp == pytest.approx(rdp.RdpAccountant().compose(events).get_epsilon(DELTA), rel=1e-6)


def test_thousands_of_equal_releases_equal_one_of_all_steps() -> None:
    rounds = [replace(REFERENCE, steps=1)] * 5000
    guarantee = compose(rounds, DELTA)
    assert guarantee == replace(compose([replace(REFERENCE, steps=5000)], DELTA), num_releases=5000)
    assert guarantee.releases == (replace(REFERENCE, steps=5000),)


def test_nothing_released_costs_nothing() -> None:
    assert compose([], DELTA).epsilon == 0
    assert compose([SampledGaussian(noise_multiplier=0, sampling_rate=0)], DELTA).epsilon == 0


def test_a_release_without_noise_has_an_infinite_epsilon() -> None:
    guarantee = compose([REFERENCE, gaussian(0)], DELTA)
    assert guarantee.pld == guarantee.rdp == guarantee.epsilon == math.inf
    assert any("no noise" in sentence for sentence in guarantee.assumptions)


@pytest.mark.parametrize(
    ("release", "delta", "why"),
    [
        (gaussian(0.001), DELTA, "ε is above 500"),
        (replace(REFERENCE, steps=10**7), 1e-3, "ε is above 500"),
        (SampledGaussian(noise_multiplier=1, sampling_rate=1e-5, steps=10**7), DELTA, "10,000,000 steps"),
        (REFERENCE, 1e-13, "at δ = 1e-13"),
        (gaussian(1), 1e-15, "1 step at δ = 1e-15"),
    ],
)
def test_where_pld_does_not_apply_rdp_stands_alone_and_says_why(
    release: SampledGaussian, delta: float, why: str
) -> None:
    guarantee = compose([release], delta)
    assert guarantee.pld is None
    assert guarantee.epsilon == guarantee.rdp
    assert why in guarantee.assumptions[-1]


@pytest.mark.parametrize(("total", "steps", "delta"), [(3, 10**3, 1e-11), (1, 10**3, 1e-12), (0.1, 10**5, 1e-12)])
def test_rounding_errors_of_many_steps_never_lower_epsilon(total: float, steps: int, delta: float) -> None:
    noise = math.sqrt(steps) / total
    almost_all = SampledGaussian(noise_multiplier=noise, sampling_rate=1 - 1e-12, steps=steps)
    assert compose([almost_all], delta).epsilon >= analytic(1 / total, delta)


def test_divergences_that_round_to_less_than_zero_do_not_count_as_none() -> None:
    release = SampledGaussian(noise_multiplier=1e5, sampling_rate=1e-5, steps=10**9)
    mean_shift = math.sqrt(release.steps) * release.sampling_rate / release.noise_multiplier
    total_variation = mean_shift / math.sqrt(2 * math.pi)  # ε = 0 needs δ to be at least this large
    assert total_variation > 1e-12
    assert compose([release], 1e-12).epsilon > 0


def test_many_different_settings_are_rounded_so_that_epsilon_grows_a_little() -> None:
    releases = [SampledGaussian(noise_multiplier=2 + i / 1000, sampling_rate=0.05, steps=10) for i in range(100)]
    guarantee = compose(releases, DELTA)
    events = dp.ComposedDpEvent([event(release) for release in releases])
    exact = rdp.RdpAccountant().compose(events).get_epsilon(DELTA)
    assert exact <= guarantee.rdp <= 1.1 * exact
    assert guarantee.pld is not None
    assert any("100 different settings" in sentence for sentence in guarantee.assumptions)


def test_the_guarantee_states_unit_sampling_and_neighboring_relation() -> None:
    sampled, full = compose([REFERENCE], DELTA, unit="client"), compose([gaussian(1)], DELTA)
    assert (sampled.unit, sampled.sampling, full.unit, full.sampling) == ("client", "poisson", "photo", "none")
    assert any("one store with all its photos" in sentence for sentence in sampled.assumptions)
    assert any("each store is drawn independently" in sentence for sentence in sampled.assumptions)
    assert not any("drawn" in sentence for sentence in full.assumptions)
    stated = full.to_json()
    assert stated["neighboring_relation"] == "add-or-remove-one"
    assert stated["releases"] == [gaussian(1).to_json()]
    json.dumps(stated, allow_nan=False)


@pytest.mark.parametrize("target", [0.5, 8.0])
@pytest.mark.parametrize(("rate", "steps"), [(0.05, 1000), (1.0, 1), (1.0, 40), (0.001, 50_000)])
def test_calibrated_noise_uses_the_target_to_one_percent_and_never_exceeds_it(
    target: float, rate: float, steps: int
) -> None:
    noise = noise_multiplier_for(target, DELTA, sampling_rate=rate, steps=steps)
    found = compose([SampledGaussian(noise_multiplier=noise, sampling_rate=rate, steps=steps)], DELTA).epsilon
    assert 0.99 * target <= found <= target


def test_noise_for_rounds_to_come_leaves_room_for_the_releases_made_already() -> None:
    before = [gaussian(5.0), replace(REFERENCE, noise_multiplier=2.0, steps=200)]
    noise = noise_multiplier_for(4.0, DELTA, sampling_rate=0.05, steps=10 * 30, before=before)
    rounds = [SampledGaussian(noise_multiplier=noise, sampling_rate=0.05, steps=30)] * 10
    assert 0.99 * 4 <= compose([*before, *rounds], DELTA).epsilon <= 4
    assert noise > noise_multiplier_for(4.0, DELTA, sampling_rate=0.05, steps=10 * 30)


def test_a_spent_budget_or_an_impossible_target_is_an_error() -> None:
    with pytest.raises(BudgetError, match=r"an ε of 9\.192 was spent by 1 release already"):
        noise_multiplier_for(8.0, DELTA, before=[REFERENCE])
    with pytest.raises(BudgetError, match="no noise multiplier up to 1,000,000 keeps 1,000,000,000 steps"):
        noise_multiplier_for(1e-9, 1e-9, steps=10**9)


@pytest.mark.parametrize("value", [REFERENCE, gaussian(3), SampledGaussian(noise_multiplier=0, sampling_rate=0)])
def test_a_release_survives_json(value: SampledGaussian) -> None:
    assert SampledGaussian.from_json(json.loads(json.dumps(value.to_json()))) == value


@pytest.mark.parametrize(
    "change",
    [
        {"noise_multiplier": -1}, {"noise_multiplier": math.nan}, {"noise_multiplier": math.inf},
        {"noise_multiplier": 1e7}, {"noise_multiplier": "1"}, {"noise_multiplier": True}, {"steps": -(10**4000)},
        {"noise_multiplier": None}, {"sampling_rate": 1.001}, {"sampling_rate": -1e-9}, {"sampling_rate": [0.5]},
        {"steps": 0}, {"steps": 1.5}, {"steps": 1.0}, {"steps": 10**9 + 1}, {"steps": True}, {"mechanism": "laplace"},
        {"mechanism": ["sampled-gaussian"]}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_malformed_release_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as refused:
        SampledGaussian.from_json(REFERENCE.to_json() | change)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("value", [None, [], "release", {}, {1: 2}, {"steps": 1}])
def test_what_is_not_a_release_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="a release has the keys mechanism, noise_multiplier, sampling_rate, steps"):
        SampledGaussian.from_json(value)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, math.nan])
def test_a_delta_that_is_no_probability_is_refused(delta: float) -> None:
    with pytest.raises(UsageError, match="delta"):
        compose([REFERENCE], delta)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(UsageError) as refused:
        SampledGaussian(noise_multiplier=-1, sampling_rate=2, steps=0)
    assert len(refused.value.args) == 3


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    epsilon._dp_accounting.cache_clear()
    with pytest.raises(UsageError, match=r"pip install 'fedshelf\[dp\]'"):
        compose([REFERENCE], DELTA)


@pytest.mark.parametrize("rate", [1e-3, 0.5, 1.0])
@pytest.mark.parametrize("noise", [5e-5, 1e-155, 1e-200, 5e-324])
def test_next_to_no_noise_guarantees_nothing(noise: float, rate: float) -> None:
    """Divergences overflow there: not a number, from which the conversion made an ε of zero."""
    one = SampledGaussian(noise_multiplier=noise, sampling_rate=rate, steps=10)
    assert compose([REFERENCE, one], DELTA).epsilon == math.inf
