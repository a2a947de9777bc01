"""What Yin et al. 2018, Blanchard et al. 2017 and Sun et al. 2019 say of their rules, asserted of these."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedshelf.algorithms import reduce, robust
from fedshelf.algorithms.reduce import Verdict, norm, plain_mean, quick_norm
from fedshelf.algorithms.robust import (
    AutoNormBound,
    MultiKrum,
    NormBound,
    TrimmedMean,
    coordinate_median,
    krum_scores,
    num_assumed,
    squared_distances,
)
from fedshelf.core.messages import STATISTICS, TRAINABLE
from tests.worlds import aggregator

SEEDS = st.integers(0, 2**30)
REDUCERS = [coordinate_median, TrimmedMean(0.25), plain_mean]
ROBUST: list[str] = ["median", "trimmed-mean", "multi-krum"]


def rows(*columns: list[float]) -> list[Tensor]:
    """Uploads whose k-th coordinates are the k-th column."""
    return list(torch.tensor(columns).T.contiguous())


def drawn(seed: int, count: int, size: int, scale: float = 1.0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=draw) * scale for _ in range(count)]


def equal(count: int) -> list[float]:
    return [1 / count] * count


def test_the_median_is_the_middle_and_of_an_even_number_the_mean_of_the_middle_two() -> None:
    odd = rows([5.0, 1.0, 2.0], [-9.0, 7.0, 0.5])
    assert coordinate_median(odd, equal(3)).tolist() == [2.0, 0.5]
    even = rows([5.0, 1.0, 2.0, 100.0], [-9.0, 7.0, 0.5, 0.25])
    assert coordinate_median(even, equal(4)).tolist() == [3.5, 0.375]
    assert coordinate_median(rows([3.0]), [1.0]).tolist() == [3.0]
    assert coordinate_median(rows([3.0, 4.0]), equal(2)).tolist() == [3.5]


def test_the_trimmed_mean_leaves_out_the_share_at_each_end() -> None:
    eight = rows([8.0, 1.0, 900.0, 3.0, 4.0, -700.0, 6.0, 7.0])
    assert TrimmedMean(0.25)(eight, equal(8)).tolist() == [(3 + 4 + 6 + 7) / 4]
    assert TrimmedMean(0.2)(eight, equal(8)).tolist() == [pytest.approx((1 + 3 + 4 + 6 + 7 + 8) / 6)]
    assert TrimmedMean(0.4)(eight, equal(8)).tolist() == [5.0]
    assert TrimmedMean(0.0)(rows([1.0, 2.0, 6.0]), equal(3)).tolist() == [3.0]


@pytest.mark.parametrize(
    ("count", "trim", "expected"),
    [(8, 0.25, 2), (11, 0.25, 2), (12, 0.25, 3), (100, 0.29, 29), (30, 0.1, 3), (3, 0.25, 1), (1, 0.01, 1), (8, 0, 0)],
)
def test_the_assumed_number_is_the_share_rounded_down_but_never_none(count: int, trim: float, expected: int) -> None:
    assert num_assumed(count, trim) == expected


@given(values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=2), trim=st.floats(0.01, 0.49))
def test_one_or_two_uploads_are_averaged_since_none_can_be_told_to_be_the_wrong_one(
    values: list[float], trim: float
) -> None:
    found = TrimmedMean(trim)(rows(values), equal(len(values)))
    assert found.item() == pytest.approx(sum(values) / len(values), rel=1e-6)


@given(count=st.integers(3, 4), trim=st.floats(0.01, 0.24))
def test_the_trimmed_mean_of_a_tiny_cohort_still_cuts_one_at_each_end(count: int, trim: float) -> None:
    values = [1.0, 1e9, 2.0, 2.0][:count]
    assert TrimmedMean(trim)(rows(values), equal(count)).item() == 2.0


def test_krum_sums_the_squared_distances_to_the_n_minus_f_minus_2_closest() -> None:
    distances = squared_distances(rows([0.0, 1.0, 3.0, 4.0, 100.0]))
    assert distances[0].tolist() == [0.0, 1.0, 9.0, 16.0, 10_000.0]
    assert krum_scores(distances, 1) == [1 + 9, 1 + 4, 1 + 4, 1 + 9, 96**2 + 97**2]
    six = squared_distances(rows([0.0, 1.0, 3.0, 4.0, 9.0, 100.0]))
    assert krum_scores(six, 1) == [26, 14, 14, 26, 25 + 36 + 64, 91**2 + 96**2 + 97**2]
    assert krum_scores(six, 2)[:3] == [10, 5, 5]


def test_multi_krum_selects_n_minus_f_and_says_how_far_out_the_others_are() -> None:
    verdicts = MultiKrum(0.2)({TRAINABLE: rows([0.0, 100.0, 3.0, 5.0, 1.0])})
    assert [verdict.left_out for verdict in verdicts] == [False, True, False, False, False]
    score, limit = 95**2 + 97**2, 2**2 + 4**2  # four pass: the largest of their scores is that of 5
    assert f"its {TRAINABLE} values score {score / limit:.3g} times the limit" in verdicts[1].reason
    assert verdicts[0] == Verdict()
    spread = rows([1.0, 2.0, 4.0, 50.0, 3.0, 2.5, -70.0, 3.5])
    left_out = [verdict.left_out for verdict in MultiKrum(0.25)({TRAINABLE: spread})]
    assert [i for i, out in enumerate(left_out) if out] == [3, 6]
    assert not any(verdict.left_out for verdict in MultiKrum(0.0)({TRAINABLE: spread}))


def test_multi_krum_finds_whoever_poisons_a_part_of_small_numbers() -> None:
    """Together with weights of another scale, statistics a hundred times too large would be noise."""
    parts = {TRAINABLE: drawn(1, 8, 50, scale=1e3), STATISTICS: drawn(2, 8, 10, scale=1e-2)}
    parts[STATISTICS][5] *= 100
    parts["auxiliary.c"] = drawn(3, 8, 50)
    parts["auxiliary.c"][2] *= 100
    verdicts = MultiKrum(0.25)(parts)
    assert {i: v.reason.split()[5] for i, v in enumerate(verdicts) if v.left_out} == {2: "auxiliary.c", 5: STATISTICS}


def test_a_huge_part_does_not_make_the_other_parts_of_honest_clients_the_larger_ones() -> None:
    """The scale of a part is a score that honest clients have."""
    parts = {TRAINABLE: rows([0.0, 100.0, 3.0, 4.0, 1.0]), STATISTICS: rows([0.0, 1.0, 3.0, 4.0, 9.0])}
    assert [verdict.left_out for verdict in MultiKrum(0.2)(parts)] == [False, True, False, False, False]


def test_identical_uploads_are_no_trouble_for_scales_of_zero() -> None:
    parts = {TRAINABLE: rows([2.0] * 5), STATISTICS: rows([1.0, 1.0, 1.0, 8.0, 1.0])}
    assert [verdict.left_out for verdict in MultiKrum(0.2)(parts)] == [False, False, False, True, False]


@given(seed=SEEDS, count=st.integers(5, 14), size=st.integers(1, 20), distance=st.floats(1e2, 1e30))
def test_multi_krum_leaves_out_far_outliers_wherever_they_stand_together(
    seed: int, count: int, size: int, distance: float
) -> None:
    draw = random.Random(seed)
    uploads = drawn(seed, count, size)
    outliers = sorted(draw.sample(range(count), num_assumed(count, 0.25)))
    if count < 2 * len(outliers) + 3:
        return
    for i in outliers:
        uploads[i] = torch.full((size,), distance) + uploads[i]
    found = MultiKrum(0.25)({TRAINABLE: uploads})
    assert [i for i, verdict in enumerate(found) if verdict.left_out] == outliers


@given(seed=SEEDS, count=st.integers(5, 12))
def test_multi_krum_selects_the_same_clients_in_any_order(seed: int, count: int) -> None:
    uploads = drawn(seed, count, 30)
    order = random.Random(seed).sample(range(count), count)
    found = MultiKrum(0.25)({TRAINABLE: uploads})
    shuffled = MultiKrum(0.25)({TRAINABLE: [uploads[i] for i in order]})
    assert [verdict.left_out for verdict in shuffled] == [found[i].left_out for i in order]


@given(
    seed=SEEDS, honest=st.integers(2, 9), share=st.floats(0, 1), scale=st.sampled_from([0.0, 1.0, -1e3, 1e30]),
    size=st.integers(1, 40),
)  # fmt: skip
def test_a_minority_moves_no_coordinate_of_the_median_out_of_the_honest_values(
    seed: int, honest: int, share: float, scale: float, size: int
) -> None:
    good = drawn(seed, honest, size)
    bad = drawn(seed + 1, int(share * (honest - 1)), size, scale)
    found = coordinate_median([*bad, *good], equal(len(bad) + len(good)))
    assert bool((found >= torch.stack(good).amin(0)).all())
    assert bool((found <= torch.stack(good).amax(0)).all())


@given(seed=SEEDS, count=st.integers(3, 12), scale=st.sampled_from([1.0, -1e3, 1e30]), trim=st.floats(0.05, 0.49))
def test_the_assumed_number_moves_no_coordinate_of_the_trimmed_mean_out_of_the_honest_values(
    seed: int, count: int, scale: float, trim: float
) -> None:
    num_bad = min(num_assumed(count, trim), (count - 1) // 2)
    bad, good = drawn(seed, num_bad, 20, scale), drawn(seed + 1, count - num_bad, 20)
    found = TrimmedMean(trim)([*bad, *good], equal(count))
    assert bool((found >= torch.stack(good).amin(0)).all())
    assert bool((found <= torch.stack(good).amax(0)).all())


@pytest.mark.parametrize("reducer", REDUCERS[:2])
@given(seed=SEEDS, count=st.integers(1, 9))
def test_the_order_and_the_weights_of_uploads_change_nothing(reducer: TrimmedMean, seed: int, count: int) -> None:
    uploads = drawn(seed, count, 30)
    claims = [random.Random(seed + i).random() for i in range(count)]
    found = reducer(uploads, equal(count))
    assert torch.equal(reducer(random.Random(seed).sample(uploads, count), claims), found)


@pytest.mark.parametrize("reducer", REDUCERS)
@given(seed=SEEDS, count=st.integers(1, 11))
def test_identical_uploads_are_returned_as_they_are(reducer: TrimmedMean, seed: int, count: int) -> None:
    (upload,) = drawn(seed, 1, 50, scale=1e3)
    assert torch.equal(reducer([upload] * count, equal(count)), upload)


@pytest.mark.parametrize("reducer", REDUCERS)
@given(seed=SEEDS, count=st.integers(1, 9), at_once=st.integers(1, 60))
def test_the_size_of_blocks_does_not_matter(reducer: TrimmedMean, seed: int, count: int, at_once: int) -> None:
    uploads = drawn(seed, count, 37)
    whole, distances, norms = reducer(uploads, equal(count)), squared_distances(uploads), [*map(norm, uploads)]
    with pytest.MonkeyPatch.context() as patch:
        for module in (robust, reduce):
            patch.setattr(module, "AT_ONCE", at_once)
        assert torch.equal(reducer(uploads, equal(count)), whole)
        assert [*map(norm, uploads)] == pytest.approx(norms, rel=1e-12)
    torch.testing.assert_close(squared_distances(uploads, at_once=at_once), distances, rtol=1e-12, atol=1e-12)


@given(seed=SEEDS, count=st.integers(1, 9), scale=st.sampled_from([1e-3, 1.0, 1e6]))
def test_squared_distances_are_those_of_the_differences(seed: int, count: int, scale: float) -> None:
    uploads = drawn(seed, count, 40, scale)
    plain = torch.tensor([[float((a.double() - b.double()).square().sum()) for b in uploads] for a in uploads])
    torch.testing.assert_close(squared_distances(uploads), plain.double(), rtol=1e-6, atol=0)


def test_no_squared_distance_of_uploads_that_are_almost_the_same_is_below_zero() -> None:
    """They differ by a unit in the last place of one value, which is less than rounding takes from their products."""
    (upload,) = drawn(1, 1, 60, scale=1e3)
    uploads = [upload.clone() for _ in range(12)]
    for i, row in enumerate(uploads):
        row[i] = torch.nextafter(row[i], torch.tensor(math.inf))
    distances = squared_distances(uploads)
    assert bool((distances >= 0).all())
    assert torch.equal(distances.diagonal(), torch.zeros(12, dtype=torch.float64))


def test_one_huge_upload_does_not_blur_the_distances_between_the_others() -> None:
    near = drawn(4, 2, 40)
    uploads = [near[0], torch.full((40,), 1e30), near[1]]
    assert squared_distances(uploads)[0, 2].item() == pytest.approx(squared_distances(near)[0, 1].item(), rel=1e-9)


def test_the_norm_of_weights_is_bounded_by_b_and_that_of_other_parts_by_the_median_of_the_cohort() -> None:
    parts = {
        TRAINABLE: rows([3.0, 0.0, -6.0], [4.0, 1.0, 8.0]),  # norms 5, 1, 10
        STATISTICS: rows([1.0, 30.0, 6.0]),
        "auxiliary.c": rows([0.5, 0.25, 0.0]),
    }
    verdicts = NormBound(2.0)(parts)
    assert [dict(verdict.factors) for verdict in verdicts] == [
        {TRAINABLE: 2 / 5, "auxiliary.c": 0.5},
        {STATISTICS: 6 / 30},
        {TRAINABLE: 2 / 10},
    ]
    assert verdicts[1].reason == "norm bounded: statistics from 30 to 6"
    assert not any(verdict.left_out for verdict in verdicts)


def test_an_upload_within_the_bound_is_taken_as_it_is() -> None:
    assert NormBound(5.0)({TRAINABLE: rows([3.0], [4.0])}) == [Verdict()]


@given(seed=SEEDS, count=st.integers(1, 6), bound=st.floats(1e-3, 1e3), scale=st.sampled_from([0.0, 1e-2, 1.0, 1e20]))
def test_a_norm_bound_lengthens_nothing_turns_nothing_and_bounds_everything(
    seed: int, count: int, bound: float, scale: float
) -> None:
    uploads = drawn(seed, count, 25, scale)
    for verdict, upload in zip(NormBound(bound)({TRAINABLE: uploads}), uploads, strict=True):
        factor = verdict.factors.get(TRAINABLE, 1.0)
        assert 0 < factor <= 1
        length = math.sqrt(float(upload.double().square().sum()))
        assert factor * length == pytest.approx(min(length, bound), rel=1e-9)


@pytest.mark.parametrize("name", ROBUST)
def test_every_rule_can_be_had_with_a_norm_bound(name: str) -> None:
    assert aggregator(name, trim=0.25, norm_bound=3.0).screens[-1] == NormBound(3.0)
    assert NormBound(3.0) not in aggregator(name, trim=0.25, norm_bound=None).screens


@pytest.mark.parametrize(("count", "trim", "krum"), [(4, 0.25, False), (5, 0.25, True), (8, 0.25, True),
    (8, 0.4, False), (9, 0.4, True), (2, 0.1, False), (2, 0.0, True)])  # fmt: skip
def test_too_few_for_multi_krum_are_reduced_by_their_median_and_that_is_said(
    count: int, trim: float, krum: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rule = aggregator("multi-krum", trim=trim, norm_bound=2.0)
    found = rule.suited_to(count)
    assert found == (rule if krum else aggregator("median", trim=trim, norm_bound=2.0))
    assert ("the coordinate median is taken for this round" in caplog.text) is not krum


@given(seed=SEEDS, count=st.integers(4, 9), factor=st.floats(5.1, 1e6))
def test_the_automatic_bound_scales_what_stands_out_to_five_times_the_median_and_nothing_else(
    seed: int, count: int, factor: float
) -> None:
    rows = [row / norm(row) for row in drawn(seed, count, 37)]
    parts = {TRAINABLE: [*rows[:-1], rows[-1] * factor], STATISTICS: [torch.zeros(3)] * (count - 1) + [torch.ones(3)]}
    *others, last = AutoNormBound()(parts)
    assert others == [Verdict()] * (count - 1)
    assert last.factors == {TRAINABLE: pytest.approx(5 / factor, rel=1e-4)}, "a part that most leave alone has no bound"
    assert AutoNormBound()({TRAINABLE: parts[TRAINABLE][-3:]}) == [Verdict()] * 3, "three have no meaningful median"


@given(seed=SEEDS, in_cache=st.integers(1, 60))
def test_a_quick_norm_is_the_norm_in_any_blocks(seed: int, in_cache: int) -> None:
    one, other = drawn(seed, 2, 37)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduce, "IN_CACHE", in_cache)
        assert quick_norm(one) == pytest.approx(norm(one), rel=1e-5)
        assert quick_norm(one, other) == pytest.approx(norm(one.double() - other.double()), rel=1e-4)
    assert quick_norm(torch.full((3,), 1e30)) == math.inf
