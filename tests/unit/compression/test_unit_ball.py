"""Vectors of norm 1 as integers: what one of them adds to a sum is bounded, and sums have room."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from fedshelf.compression.modular import Modular
from fedshelf.compression.unit_ball import MOST_INFLATION, UnitBall
from fedshelf.core.errors import UsageError


@pytest.mark.parametrize("size", [1, 50, 25_000, 2_500_000])
@pytest.mark.parametrize("noise", [0.0, 0.5, 4.0])
def test_a_sum_of_the_largest_integers_with_noise_has_room(size: int, noise: float) -> None:
    codec = Modular(32, 0.0, 1000)
    ball = UnitBall(noise=lambda: noise).integers(codec, size)
    norm = math.sqrt(ball.squared_norm)
    assert codec.summands * norm + 11 * noise * norm < 2**31
    assert ball.inflation < 1.01
    assert ball.levels & (ball.levels - 1) == 0


def test_few_bits_have_room_for_small_models_only() -> None:
    codec, noisy = Modular(16, 0.0, 16), UnitBall(noise=lambda: 1.0)
    assert noisy.integers(codec, 10_000).inflation < MOST_INFLATION
    with pytest.raises(UsageError, match=r"modular:16:0:16 has no room for the sum of 16 updates of 2,500,000 values "
                                         r"with noise of 1 times their norm: use .* or modular:32"):  # fmt: skip
        noisy.integers(codec, 2_500_000)
    with pytest.raises(UsageError, match="has no room"):
        UnitBall(noise=lambda: 200.0).integers(codec, 1000)


def test_noise_beyond_what_can_be_drawn_makes_the_integers_smaller() -> None:
    unlimited = UnitBall(noise=lambda: 10.0).integers(Modular(32), 1_000_000)
    limited = UnitBall(noise=lambda: 10.0, most_deviation=30_000.0).integers(Modular(32), 1_000_000)
    assert limited.levels < unlimited.levels
    assert 10 * math.sqrt(limited.squared_norm) <= 30_000


@pytest.mark.parametrize(
    "vector",
    [
        lambda size: np.eye(1, size)[0],
        lambda size: np.full(size, size**-0.5),
        lambda size: np.random.default_rng(1).standard_normal(size),
    ],
    ids=["one value", "all alike", "random"],
)
def test_conditional_rounding_succeeds_as_often_as_the_paper_says(
    vector: Callable[[int], np.ndarray[tuple[int, ...], np.dtype[np.float64]]],
) -> None:
    size = 5000
    ball, draw = UnitBall().integers(Modular(32), size), np.random.default_rng(0)
    values = vector(size)
    values *= ball.levels / np.linalg.norm(values)
    rounded = [np.floor(values + draw.random(size)).astype(np.int64) for _ in range(200)]
    assert np.mean([ball.contains(codes) for codes in rounded]) > 0.39
    assert not ball.contains(np.ceil(values * 1.02).astype(np.int64))
