"""How many take part, who, and how many are enough."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedshelf.core.rng import Rng
from fedshelf.scheduling import cohort


@pytest.mark.parametrize(
    ("population", "fraction", "expected"),
    [(8, 1.0, 8), (8, 0.5, 4), (7, 0.5, 4), (8, 0.1, 1), (10, 0.3, 3), (100, 0.07, 7), (1, 0.01, 1), (10, 0.11, 2)],
)
def test_a_cohort_is_the_fraction_rounded_up_and_at_least_one(population: int, fraction: float, expected: int) -> None:
    assert cohort.size(population, fraction=fraction) == expected


@pytest.mark.parametrize(
    ("members", "configured", "expected"),
    [
        (1, None, 1), (2, None, 2), (3, None, 2), (4, None, 3), (5, None, 4), (6, None, 5), (10, None, 7),
        (100, None, 67), (5, 2, 2), (5, 9, 5),
    ],
)  # fmt: skip
def test_a_quorum_is_as_configured_or_more_than_two_thirds(members: int, configured: int | None, expected: int) -> None:
    assert cohort.quorum(members, configured) == expected


@given(names=st.lists(st.text(), unique=True, min_size=1), seed=st.integers(0, 2**40), data=st.data())
def test_the_draw_does_not_depend_on_the_order_of_names(names: list[str], seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(names)))
    drawn = cohort.draw(names, count, Rng(seed))
    shuffled = random.Random(seed).sample(names, len(names))
    assert drawn == cohort.draw(shuffled, count, Rng(seed))
    assert len(set(drawn)) == count
    assert set(drawn) <= set(names)
    assert list(drawn) == sorted(drawn)


def test_everyone_is_drawn_about_equally_often() -> None:
    names = list("abcdefgh")
    counts = dict.fromkeys(names, 0)
    for seed in range(2000):
        for name in cohort.draw(names, 2, Rng(seed)):
            counts[name] += 1
    assert all(420 < count < 580 for count in counts.values()), counts


def test_weighted_draws_take_each_client_in_proportion() -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 5.0}
    counts = dict.fromkeys(weights, 0)
    for seed in range(4000):
        (name,) = cohort.draw("abc", 1, Rng(seed), weights)
        counts[name] += 1
    assert [round(8 * counts[name] / 4000, 1) for name in "abc"] == pytest.approx([1, 2, 5], abs=0.25)


@given(seed=st.integers(0, 2**40), count=st.integers(1, 4), data=st.data())
def test_a_weighted_draw_is_a_cohort_too(seed: int, count: int, data: st.DataObject) -> None:
    weights = {name: data.draw(st.floats(1e-6, 1e12)) for name in "abcd"}
    drawn = cohort.draw("dbca", count, Rng(seed), weights)
    assert drawn == cohort.draw("abcd", count, Rng(seed), weights)
    assert len(set(drawn)) == count
    assert list(drawn) == sorted(drawn)


@given(seed=st.integers(0, 2**40), scale=st.sampled_from([2.0**-60, 2.0**-20, 2.0**60]))
def test_only_the_proportions_of_weights_matter_to_a_draw(seed: int, scale: float) -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 5.0, "d": 1.5}
    scaled = {name: scale * weight for name, weight in weights.items()}
    assert cohort.draw("abcd", 2, Rng(seed), weights) == cohort.draw("abcd", 2, Rng(seed), scaled)


def test_stores_that_are_seldom_open_take_part_as_often_as_others_in_the_long_run() -> None:
    """Two of three are always there; the third in every fourth round. One is drawn each time."""
    times_live: dict[str, int] = {}
    counts = dict.fromkeys("abc", 0)
    for number in range(1, 4001):
        live = "abc" if number % 4 == 0 else "ab"
        weights = cohort.sampling_weights("availability", live, num_train={}, times_live=times_live, round=number)
        (name,) = cohort.draw(live, 1, Rng(7).fork(round=number, purpose="cohort"), weights)
        counts[name] += 1
        times_live |= {present: times_live.get(present, 0) + 1 for present in live}
    uniform = 4000 / 4 / 3
    assert counts["c"] > 1.5 * uniform
    assert counts["a"] == pytest.approx(counts["b"], rel=0.1)


@pytest.mark.parametrize(
    ("count", "population", "share", "expected"),
    [(5, 20, 0.3, 7), (10, 100, 0.1, 11), (4, 20, 0.5, 6), (5, 6, 1.0, 6), (5, 20, 0.0, 5), (3, 20, 10.0, 20)],
)
def test_over_selection_asks_the_share_more_rounded_up_and_no_more_than_there_are(
    count: int, population: int, share: float, expected: int
) -> None:
    assert cohort.over_selected(count, population, share) == expected


def test_sampling_by_availability_goes_by_how_often_a_store_was_there_this_time_included() -> None:
    found = cohort.sampling_weights("availability", "abc", num_train={}, times_live={"a": 7, "b": 1}, round=8)
    assert found == {"a": 1.0, "b": 4.0, "c": 8.0}


def test_sampling_by_size_goes_by_photos_and_uniform_by_nothing() -> None:
    facts = {"num_train": {"a": 10, "b": 30}, "times_live": {}, "round": 1}
    assert cohort.sampling_weights("size", "ab", **facts) == {"a": 10.0, "b": 30.0}  # type: ignore[arg-type]
    assert cohort.sampling_weights("uniform", "ab", **facts) is None  # type: ignore[arg-type]
