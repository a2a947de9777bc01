"""How many take part, who, and how many are enough."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedshelf.core.rng import Rng
from fedshelf.rounds import cohort


@pytest.mark.parametrize(
    ("population", "fraction", "min_clients", "expected"),
    [
        (8, 1.0, 2, 8), (8, 0.5, 2, 4), (7, 0.5, 2, 4), (8, 0.1, 2, 2), (8, 0.1, 1, 1), (10, 0.3, 1, 3),
        (100, 0.07, 1, 7), (3, 0.5, 5, 3), (1, 0.01, 1, 1), (10, 0.11, 1, 2),
    ],
)  # fmt: skip
def test_a_cohort_is_the_fraction_rounded_up_within_its_bounds(
    population: int, fraction: float, min_clients: int, expected: int
) -> None:
    assert cohort.size(population, fraction=fraction, min_clients=min_clients) == expected


@pytest.mark.parametrize(
    ("members", "configured", "expected"),
    [(10, None, 8), (5, None, 4), (4, None, 4), (3, None, 3), (1, None, 1), (6, None, 5), (5, 2, 2), (5, 9, 5)],
)
def test_a_quorum_is_as_configured_or_four_fifths_rounded_up(
    members: int, configured: int | None, expected: int
) -> None:
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
