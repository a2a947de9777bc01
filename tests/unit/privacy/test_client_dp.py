"""Noise on the sum of uploads at the server: each upload is bounded, and the bound follows the uploads' norms."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedshelf.algorithms.aggregation import Combination, combine
from fedshelf.algorithms.base import Aggregate
from fedshelf.algorithms.reduce import Aggregator
from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import DELTA, TaskKey, Upload
from fedshelf.privacy.client_dp import ClippedAtClient, JointClip, NoisyMean, Within

KEY = bytes(range(32))
T, S = 6, 10


def upload(vector: Tensor, **auxiliary: Tensor) -> Upload:
    made = Upload(
        key=TaskKey(run_id="r", round=1, attempt=0), vectors={DELTA: vector}, num_examples=5, num_steps=1,
        train_loss=None, seconds=0.0,
    )  # fmt: skip
    return made.with_auxiliary(**auxiliary) if auxiliary else made


def folded(uploads: Sequence[Upload], clip_norm: float) -> Combination:
    return combine(
        uploads, [1.0] * len(uploads), Aggregator(screens=(JointClip(clip_norm),)), num_trainable=T
    )  # fmt: skip


def random_uploads(count: int, scale: float = 1.0, seed: int = 0, **auxiliary: int) -> list[Upload]:
    generator = torch.Generator().manual_seed(seed)
    return [
        upload(
            scale * torch.randn(S, generator=generator),
            **{name: scale * torch.randn(size, generator=generator) for name, size in auxiliary.items()},
        )
        for _ in range(count)
    ]


def joint(delta: Tensor, auxiliary: Mapping[str, Tensor]) -> float:
    return math.hypot(float(delta.norm()), *(float(vector.norm()) for vector in auxiliary.values()))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_the_influence_of_a_store_is_at_most_the_clip_norm(scale: float) -> None:
    uploads = random_uploads(5, scale, variate=T)
    whole, _ = folded(uploads, 0.5)
    without, _ = folded(uploads[:-1], 0.5)
    difference = 5 * whole.delta - 4 * without.delta
    variates = {name: 5 * whole.auxiliary[name] - 4 * without.auxiliary[name] for name in whole.auxiliary}
    assert 0 < joint(difference, variates) <= 0.5 * (1 + 1e-4)


def test_small_uploads_are_not_changed() -> None:
    uploads = random_uploads(3, 1e-3)
    whole, verdicts = folded(uploads, 1.0)
    assert torch.allclose(whole.delta, torch.stack([each.delta for each in uploads]).mean(0))
    assert not any(verdict.factors for verdict in verdicts)


def released(
    num_uploads: int = 4, *, expected: float = 8.0, noise: float = 1.0, key: bytes = KEY, clip_norm: float = 0.5,
    seed: int = 0, size: int = S, **values: Any,
) -> tuple[tuple[Aggregate, float], Aggregate]:  # fmt: skip
    uploads = random_uploads(num_uploads, 1e-3, seed)
    aggregate, verdicts = folded(uploads, clip_norm)
    if size != S:
        aggregate = Aggregate(delta=torch.zeros(size), num_clients=num_uploads, num_trainable=T)
    mean = NoisyMean(noise_multiplier=noise, clip_norm=clip_norm, **values)
    return mean.release(aggregate, Within.of(verdicts), expected=expected, clip_norm=clip_norm, key=key), aggregate


def test_the_sum_is_divided_by_the_expected_number_of_stores() -> None:
    (noisy, _), aggregate = released(noise=1e-9)
    assert torch.allclose(noisy.delta, aggregate.delta * 4 / 8, atol=1e-8)
    assert noisy.num_clients == 8  # not how many there were


def test_noise_has_the_declared_deviation() -> None:
    (noisy, _), _ = released(noise=3.0, size=100_000)
    assert noisy.delta.std() == pytest.approx(3.0 * 0.5 / 8, rel=0.02)


def test_the_same_sum_gets_the_same_noise_and_another_sum_other_noise() -> None:
    (first, _), exact = released()
    (again, _), _ = released()
    (other, _), changed = released(seed=1)
    assert torch.equal(first.delta, again.delta)
    noise, changed_noise = first.delta - exact.delta / 2, other.delta - changed.delta / 2
    assert not torch.allclose(noise, changed_noise, atol=1e-3)


def test_another_key_gives_other_noise() -> None:
    assert not torch.equal(released()[0][0].delta, released(key=bytes(32))[0][0].delta)


def test_a_round_of_nobody_is_noise_alone() -> None:
    mean = NoisyMean(noise_multiplier=1.0, clip_norm=0.5)
    nothing = Aggregate(delta=torch.zeros(50_000), num_clients=0, num_trainable=50_000)
    noisy, _ = mean.release(nothing, Within.of(()), expected=2.0, clip_norm=0.5, key=KEY)
    assert noisy.delta.std() == pytest.approx(0.25, rel=0.03)


def test_noise_on_the_count_is_paid_for_by_more_noise_on_the_sum() -> None:
    mean = NoisyMean(noise_multiplier=1.0, clip_norm=0.5, is_adaptive=True)
    for expected in (2.0, 20.0, 100.0):
        of_sum, of_count = mean.deviations(expected)
        assert (of_sum**-2 + (2 * of_count) ** -2) ** -0.5 == pytest.approx(1.0)
        assert of_sum < 1.2


@pytest.mark.parametrize("start", [0.01, 100.0])
def test_the_norm_follows_the_quantile(start: float) -> None:
    """Andrew et al. 2021: from far too low and far too high, within 0.05 of the share by round 60."""
    generator, stores, shares = torch.Generator().manual_seed(1), 120, []
    mean, norm = NoisyMean(noise_multiplier=1.0, clip_norm=start, is_adaptive=True), start
    for number in range(1, 81):
        norms = torch.exp(0.4 * torch.randn(stores, generator=generator))  # the median is 1
        uploads = [upload(torch.full((S,), float(each) / math.sqrt(S))) for each in norms]
        aggregate, verdicts = folded(uploads, norm)
        if number > 60:
            shares.append(sum(not verdict.factors for verdict in verdicts) / stores)
        _, norm = mean.release(
            aggregate, Within.of(verdicts), expected=float(stores), clip_norm=norm, key=number.to_bytes(32, "big")
        )
    assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.05)


class _WithoutNoise(NoisyMean):
    def deviations(self, expected: float) -> tuple[float, float]:
        return 0.0, 0.0


def test_a_store_moves_sum_and_count_by_no_more_than_the_noise_multiplier_allows() -> None:
    """A store that is not clipped moves the sum by up to the norm, and the count by one half, not by one."""
    expected = 8.0
    of_sum, of_count = NoisyMean(noise_multiplier=1.0, clip_norm=0.5, is_adaptive=True).deviations(expected)
    exact = _WithoutNoise(noise_multiplier=1.0, clip_norm=0.5, is_adaptive=True, rate=1.0)

    def count(num_uploads: int) -> float:
        aggregate, verdicts = folded(random_uploads(num_uploads, 1e-3), 0.5)
        _, norm = exact.release(aggregate, Within.of(verdicts), expected=expected, clip_norm=0.5, key=KEY)
        return -expected * math.log(norm / 0.5)

    assert math.hypot(1 / of_sum, (count(5) - count(4)) / of_count) == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e30])
def test_a_store_scales_all_its_vectors_by_one_factor_into_the_unit_ball(scale: float) -> None:
    [given] = random_uploads(1, scale, variate=T)
    clipped = ClippedAtClient(clip_norm=0.5).apply(given, 0.5)
    norm = joint(given.delta.double(), {name: each.double() for name, each in given.auxiliary.items()})
    factor = 1 / max(norm, 0.5)
    torch.testing.assert_close(clipped.delta, given.delta * factor, rtol=1e-6, atol=0)
    torch.testing.assert_close(clipped.auxiliary["variate"], given.auxiliary["variate"] * factor, rtol=1e-6, atol=0)
    double = {name: each.double() for name, each in clipped.auxiliary.items()}
    assert joint(clipped.delta.double(), double) <= 1
    assert set(clipped.vectors) == set(given.vectors), "nothing is told of a fixed norm"
    adaptive = ClippedAtClient(clip_norm="adaptive").apply(given, 0.5)
    assert adaptive.plain_vectors["within"].tolist() == [0.5 if scale == 1e-4 else -0.5]


def test_a_store_that_adds_noise_tells_no_figures_without_it() -> None:
    given = replace(upload(torch.ones(S)), train_loss=1.0)
    at_server, at_stores = (
        ClippedAtClient(clip_norm=0.5, noise_at=noise_at).apply(given, 0.5) for noise_at in ("server", "stores")
    )
    assert (at_server.num_examples, at_server.num_steps, at_server.train_loss, at_server.seconds) == (5, 1, 1.0, 0.0)
    assert {at_stores.num_examples, at_stores.num_steps, at_stores.train_loss, at_stores.seconds} == {None}


@pytest.mark.parametrize(
    ("configured", "named", "said"),
    [
        (0.5, None, "clip norm is missing, and the run has --clip-norm 0.5"),
        (0.5, 0.6, "clip norm is 0.6, and the run has --clip-norm 0.5"),
        ("adaptive", 0.0, "clip norm is 0,"),
        ("adaptive", math.inf, "clip norm is inf"),
        ("adaptive", math.nan, "clip norm is nan"),
    ],
)
def test_a_store_refuses_a_norm_that_the_run_does_not_have(configured: Any, named: float | None, said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        ClippedAtClient(clip_norm=configured).apply(upload(torch.ones(S)), named)


def test_rounding_at_the_stores_is_covered_by_more_noise_and_their_own_noise_by_none() -> None:
    nothing = Aggregate(delta=torch.zeros(50_000), num_clients=4, num_trainable=50_000)
    found = {}
    for noise_at, inflation in (("server", 1.0), ("server", 1.5), ("stores", 1.0)):
        mean = NoisyMean(noise_multiplier=1.0, clip_norm=0.5, noise_at=noise_at)  # type: ignore[arg-type]
        within = Within(num_uploads=4, total=0.0)
        noisy, _ = mean.release(nothing, within, expected=4.0, clip_norm=0.5, key=KEY, inflation=inflation)
        found[noise_at, inflation] = float(noisy.delta.std())
    assert found["server", 1.5] == pytest.approx(1.5 * found["server", 1.0])
    assert found["stores", 1.0] == 0
