"""How fast clients are seen to be, and the steps that they are given for it."""

import math
import statistics
from dataclasses import replace
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedshelf.core.choices import LocalWork, WorkNorm
from fedshelf.scheduling import pace as paces
from fedshelf.scheduling.workload import Workload
from fedshelf.training import optimizer
from fedshelf.training.settings import TrainingSettings
from tests.worlds import PLAIN, bound_model

SECONDS = st.floats(1e-3, 1e3)
RULES = st.sampled_from(["dynamic", "cut"])
NORMS: tuple[WorkNorm, WorkNorm] = ("l1", "l2")


class Cohort(NamedTuple):
    """Steps of the configured epochs, and seconds per step."""

    configured: dict[str, int]
    pace: dict[str, float]


@st.composite
def cohorts(draw: st.DrawFn) -> Cohort:
    names = [f"c{i}" for i in range(draw(st.integers(1, 9)))]
    return Cohort(
        {name: draw(st.integers(1, 400)) for name in names}, {name: draw(st.floats(1e-3, 1e2)) for name in names}
    )


LEAST, MOST = st.floats(0.05, 1.0), st.floats(1.0, 6.0)


@given(cohort=cohorts(), rule=RULES, least=LEAST, most=MOST)
def test_steps_lie_within_their_bounds(cohort: Cohort, rule: LocalWork, least: float, most: float) -> None:
    dealt = Workload(rule=rule, least=least, most=most).deal(*cohort)
    assert dealt.keys() == cohort.configured.keys()
    for name, steps in dealt.items():
        configured = cohort.configured[name]
        assert isinstance(steps, int)
        assert max(1, least * configured - 1e-6) <= steps <= (configured if rule == "cut" else most * configured + 1e-6)


@given(cohort=cohorts(), rule=RULES, least=LEAST, most=MOST)
def test_all_are_predicted_to_finish_together_within_a_step_where_bounds_allow(
    cohort: Cohort, rule: LocalWork, least: float, most: float
) -> None:
    """Nobody works longer than somebody who might do more, but for the half steps that are rounded."""
    dealt = Workload(rule=rule, least=least, most=most).deal(*cohort)
    upper = 1.0 if rule == "cut" else most
    for longer, pace in cohort.pace.items():
        if dealt[longer] <= max(1, least * cohort.configured[longer] + 1):
            continue  # it has the least work that it may have
        for shorter, other in cohort.pace.items():
            if dealt[shorter] < upper * cohort.configured[shorter] - 1:
                apart = dealt[longer] * pace - dealt[shorter] * other
                assert apart <= (pace + other) / 2 * (1 + 1e-9)


@given(cohort=cohorts(), least=LEAST, most=MOST)
def test_a_dynamic_round_does_as_much_work_as_a_fixed_one(cohort: Cohort, least: float, most: float) -> None:
    dealt = Workload(rule="dynamic", least=least, most=most).deal(*cohort)
    assert abs(sum(dealt.values()) - sum(cohort.configured.values())) <= len(dealt) / 2


@given(cohort=cohorts())
def test_a_dynamic_round_is_never_predicted_to_take_longer_than_a_fixed_one(cohort: Cohort) -> None:
    dealt = Workload(rule="dynamic").deal(*cohort)
    fixed = max(cohort.configured[name] * pace for name, pace in cohort.pace.items())
    assert all(dealt[name] * pace <= fixed + pace / 2 for name, pace in cohort.pace.items())


@given(cohort=cohorts(), rule=RULES, seconds=SECONDS)
def test_those_who_finish_together_anyway_do_their_epochs(cohort: Cohort, rule: LocalWork, seconds: float) -> None:
    """Equal machines with equal amounts of photos, for example."""
    pace = {name: seconds / steps for name, steps in cohort.configured.items()}
    assert Workload(rule=rule).deal(cohort.configured, pace) == cohort.configured


@given(cohort=cohorts(), rule=st.sampled_from(["fixed", "dynamic", "cut"]))
def test_where_nothing_is_known_work_is_as_configured(cohort: Cohort, rule: LocalWork) -> None:
    assert Workload(rule=rule).deal(cohort.configured, {}) == cohort.configured
    assert Workload(rule="fixed").deal(*cohort) == cohort.configured


@given(cohort=cohorts())
def test_cutting_takes_from_those_alone_who_are_slower_than_the_median(cohort: Cohort) -> None:
    dealt = Workload(rule="cut").deal(*cohort)
    durations = {name: steps * cohort.pace[name] for name, steps in cohort.configured.items()}
    for name, duration in durations.items():
        if duration <= statistics.median(durations.values()):
            assert dealt[name] == cohort.configured[name]


def test_a_slow_machine_does_less_a_fast_one_more() -> None:
    """Slownesses 1, 1, 2, 4 and 40 steps each: T · (1 + 1 + 1/2 + 1/4) = 160 steps."""
    dealt = Workload(rule="dynamic").deal(dict.fromkeys("abcd", 40), {"a": 1, "b": 1, "c": 2, "d": 4})
    assert dealt == {"a": 58, "b": 58, "c": 29, "d": 15}
    assert Workload(rule="cut").deal(dict.fromkeys("abcd", 40), {"a": 1, "b": 1, "c": 2, "d": 4}) == {
        "a": 40, "b": 40, "c": 30, "d": 15,
    }  # fmt: skip


def test_configured_steps_are_the_batches_of_all_epochs() -> None:
    workload = Workload(training=replace(PLAIN, batch_size=16, local_epochs=3))
    assert [workload.configured(count) for count in (1, 16, 17, 100)] == [3, 3, 6, 21]


def coefficients(settings: TrainingSettings, num_steps: int) -> list[float]:
    """How far the optimizer moves, in the end, for a gradient of 1 at one of the steps."""
    found = []
    for step in range(num_steps):
        bench = bound_model(settings=settings)
        bench.params.vector.zero_()
        state = optimizer.start(bench.params, bench.gradients, settings)
        for number in range(num_steps):
            bench.gradients.fill_(1.0 if number == step else 0.0)
            optimizer.step([state], settings, 1.0)
        found.append(-bench.params.vector[0].item())
    return found


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_a_share_is_a_ratio_of_norms_of_the_coefficients_that_gradients_have(momentum: float, steps: int) -> None:
    settings = replace(PLAIN, momentum=momentum)
    these, those = coefficients(settings, steps), coefficients(settings, 12)
    straight = sum(these) / sum(those)
    noisy = math.hypot(*these) / math.hypot(*those)
    assert Workload(training=settings, norm="l1").share(steps, 12) == pytest.approx(straight, rel=1e-5)
    assert Workload(training=settings, norm="l2").share(steps, 12) == pytest.approx(noisy, rel=1e-5)
    assert Workload(training=settings, norm="none").share(steps, 12) == 1


@given(steps=st.integers(1, 1000), more=st.integers(1, 100), configured=st.integers(1, 1000))
def test_a_share_grows_with_the_steps_and_is_one_for_the_configured_ones(
    steps: int, more: int, configured: int
) -> None:
    for training in (TrainingSettings(), TrainingSettings(optimizer="adamw"), PLAIN):
        for norm in NORMS:
            workload = Workload(training=training, norm=norm)
            assert workload.share(configured, configured) == 1
            assert 0 < workload.share(steps, configured) < workload.share(steps + more, configured)
    for training in (TrainingSettings(optimizer="adamw"), PLAIN):
        plain, noisy = (Workload(training=training, norm=norm).share(steps, configured) for norm in NORMS)
        assert plain == pytest.approx(steps / configured)
        assert noisy == pytest.approx(math.sqrt(steps / configured))


@given(before=SECONDS, observed=SECONDS)
def test_what_was_before_an_observation_counts_half_as_much_after_it(before: float, observed: float) -> None:
    found = paces.updated({"a": before, "b": 7.0}, seen={"a": observed}, at_least={})
    assert found == {"a": pytest.approx((before + observed) / 2), "b": 7.0}
    assert paces.updated({}, seen={"a": observed}, at_least={}) == {"a": observed}


@given(before=st.none() | SECONDS, bound=SECONDS)
def test_a_late_client_is_at_least_as_slow_as_it_has_shown(before: float | None, bound: float) -> None:
    known = {} if before is None else {"a": before}
    assert paces.updated(known, seen={}, at_least={"a": bound}) == {"a": max(bound, before or 0)}


def test_observing_leaves_what_was_known_as_it_is() -> None:
    known = {"a": 1.0}
    paces.updated(known, seen={"a": 3.0}, at_least={"b": 2.0})
    assert known == {"a": 1.0}


@given(pace=st.dictionaries(st.sampled_from("abcdef"), SECONDS, min_size=1), names=st.sets(st.sampled_from("abcdefgh")))
def test_a_client_never_seen_has_the_median_of_the_others(pace: dict[str, float], names: set[str]) -> None:
    found = paces.predicted(pace, names)
    assert found == {name: pace.get(name, statistics.median(pace.values())) for name in names}


def test_with_nobody_seen_nothing_is_predicted() -> None:
    assert paces.predicted({}, ["a", "b"]) == {}


def test_a_pace_can_be_divided_by_even_if_no_time_has_passed() -> None:
    assert 1 / paces.per_step(0.0, 10**9) <= 1e9
    assert paces.per_step(6.0, 3) == 2.0
