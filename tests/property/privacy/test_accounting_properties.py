"""ε grows with everything that reveals more, and depends on neither order nor grouping."""

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from fedshelf.privacy.accounting import SampledGaussian, compose, noise_multiplier_for

DELTA = 1e-5
GRID = 2e-3  # relative error of distributions of privacy losses, which are computed on a grid

RELEASES = st.builds(
    SampledGaussian,
    noise_multiplier=st.floats(0.6, 20),
    sampling_rate=st.one_of(st.just(1.0), st.floats(1e-3, 0.5)),
    steps=st.integers(1, 100),
)


def bounds(*releases: SampledGaussian) -> tuple[float, float]:
    guarantee = compose(releases, DELTA)
    return guarantee.epsilon, guarantee.rdp


def assert_costs_more(more: tuple[float, float], less: tuple[float, float]) -> None:
    assert more[0] >= less[0] * (1 - GRID) - 1e-6
    assert more[1] >= less[1] * (1 - 1e-9) - 1e-9


@settings(max_examples=25, deadline=None)
@given(release=RELEASES, factor=st.floats(1.0, 4.0))
def test_epsilon_grows_with_steps_with_the_sampling_rate_and_with_less_noise(
    release: SampledGaussian, factor: float
) -> None:
    base = bounds(release)
    assert_costs_more(bounds(replace(release, steps=int(release.steps * factor))), base)
    assert_costs_more(bounds(replace(release, sampling_rate=min(1.0, release.sampling_rate * factor))), base)
    assert_costs_more(base, bounds(replace(release, noise_multiplier=release.noise_multiplier * factor)))


@settings(max_examples=25, deadline=None)
@given(releases=st.lists(RELEASES, min_size=1, max_size=5), shuffle=st.randoms(use_true_random=False))
def test_order_and_grouping_do_not_change_epsilon(releases: list[SampledGaussian], shuffle: random.Random) -> None:
    halves = []
    for release in releases:
        part = shuffle.randint(1, release.steps)
        halves.append(replace(release, steps=part))
        if part < release.steps:
            halves.append(replace(release, steps=release.steps - part))
    shuffle.shuffle(halves)
    assert bounds(*halves) == bounds(*releases)


@settings(max_examples=25, deadline=None)
@given(before=st.lists(RELEASES, max_size=3), after=st.lists(RELEASES, min_size=1, max_size=3))
def test_further_releases_never_lower_epsilon(before: list[SampledGaussian], after: list[SampledGaussian]) -> None:
    assert_costs_more(bounds(*before, *after), bounds(*before))


@settings(max_examples=6, deadline=None)
@given(target=st.floats(0.2, 20), rate=st.one_of(st.just(1.0), st.floats(1e-3, 0.5)), steps=st.integers(1, 2000))
def test_calibrated_noise_meets_any_target(target: float, rate: float, steps: int) -> None:
    noise = noise_multiplier_for(target, DELTA, sampling_rate=rate, steps=steps)
    release = SampledGaussian(noise_multiplier=noise, sampling_rate=rate, steps=steps)
    found = compose([release], DELTA).epsilon
    assert 0.99 * target <= found <= target
