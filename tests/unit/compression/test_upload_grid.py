"""All of an upload as integers: the sum of encodings decodes to the sum, on grids that no store's values move."""

import logging
import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedshelf.compression.chain import parse
from fedshelf.compression.modular import Modular
from fedshelf.compression.upload_grid import AUXILIARY_RANGE, REACH, WIDE_STEP, Integers, UploadGrid
from fedshelf.core.errors import TrainingError, UsageError
from fedshelf.core.messages import DELTA
from fedshelf.core.params import bind
from fedshelf.models.resnet import resnet10

LAYOUT = bind(resnet10(12, width=8)).layout
CONTROL, GRAM = "auxiliary.control_variate", "auxiliary.gram"
AUXILIARY = {CONTROL: (LAYOUT.num_trainable, torch.float32), GRAM: (500, torch.float64)}
SCALARS = ("weight", "num_examples", "loss")


def modular(text: str) -> Modular:
    codec = parse(text).quantizer
    assert isinstance(codec, Modular)
    return codec


def grid(text: str, *, max_weight: float = 1.0) -> UploadGrid:
    return UploadGrid.of(modular(text), LAYOUT, auxiliary=AUXILIARY, scalars=SCALARS, max_weight=max_weight)


def upload(seed: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The vectors and scalars of a store, of usual magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    delta = 0.005 * torch.randn(LAYOUT.num_shared, generator=generator)
    vectors = {
        DELTA: delta,
        CONTROL: 0.01 * torch.randn(LAYOUT.num_trainable, generator=generator),
        GRAM: 1e4 * torch.randn(500, generator=generator, dtype=torch.float64),
    }
    return vectors, {"weight": 1.0, "num_examples": 100.0 + seed, "loss": 1.25 * seed}


def summed(encodings: list[tuple[Integers, ...]]) -> tuple[Integers, ...]:
    total = tuple(vector.copy() for vector in encodings[0])
    for each in encodings[1:]:
        for into, vector in zip(total, each, strict=True):
            np.add(into, vector, out=into)
    return total


@given(st.sampled_from(["modular:16", "modular:32", "modular:16:0:8", "modular:16:0.1"]), st.integers(1, 8))
def test_a_sum_of_encodings_decodes_to_the_sum(text: str, count: int) -> None:
    grids, stores = grid(text), [upload(seed) for seed in range(count)]
    total = summed([grids.encode(*store, weight=1.0, seed=seed) for seed, store in enumerate(stores)])
    vectors, scalars = grids.decode(total)
    for one in grids.fields:
        if one.vector:
            expected = sum(vectors[one.vector].double() for vectors, _ in stores)
            assert isinstance(expected, Tensor)
            part = slice(one.start, one.start + one.size)
            error = (vectors[one.vector][part] - expected[part]).abs().max()
            assert float(error) <= count * one.step * 1.0001 + 1e-9 * float(expected.abs().max())
    for name in SCALARS:
        assert scalars[name] == pytest.approx(sum(numbers[name] for _, numbers in stores), abs=count * WIDE_STEP)


def test_counts_are_exact() -> None:
    grids = grid("modular:16")
    encodings = [grids.encode(*upload(seed), weight=1.0, seed=seed) for seed in range(8)]
    assert grids.decode(summed(encodings))[1]["num_examples"] == sum(100 + seed for seed in range(8))


def test_the_sum_does_not_depend_on_the_order_in_any_bit() -> None:
    grids = grid("modular:16")
    encodings = [grids.encode(*upload(seed), weight=1.0, seed=seed) for seed in range(4)]
    found = [grids.decode(summed(list(order)))[0] for order in permutations(encodings)]
    assert all(torch.equal(found[0][name], other[name]) for other in found for name in (DELTA, CONTROL, GRAM))


def test_encoding_is_unbiased() -> None:
    grids, (vectors, numbers) = grid("modular:16"), upload(3)
    means = torch.stack(
        [grids.decode(grids.encode(vectors, numbers, weight=1.0, seed=seed))[0][DELTA] for seed in range(400)]
    )
    deviation = max(one.step for one in grids.fields if one.part == 0) / 2 / math.sqrt(400)
    assert float((means.mean(0) - vectors[DELTA]).abs().max()) < 6 * deviation
    assert abs(float((means.mean(0) - vectors[DELTA]).mean())) < 6 * deviation / math.sqrt(LAYOUT.num_shared)


@pytest.mark.parametrize("text", ["modular:16:0:5", "modular:32:0:5", "modular:16:0:64", "modular:8:0:5"])
@pytest.mark.parametrize("sign", [1, -1])
def test_values_at_and_beyond_the_range_of_all_stores_do_not_wrap(text: str, sign: int) -> None:
    grids = grid(text)
    huge = {name: torch.full((size,), sign * 1e30, dtype=dtype) for name, (size, dtype) in AUXILIARY.items()}
    huge[DELTA] = torch.full((LAYOUT.num_shared,), sign * 1e30)
    count = grids.codec.summands
    encodings = [grids.encode(huge, dict.fromkeys(SCALARS, sign * 1e30), weight=1.0, seed=s) for s in range(count)]
    vectors, scalars = grids.decode(summed(encodings))
    for one in grids.fields:
        if one.vector:
            values = vectors[one.vector][one.start : one.start + one.size]
            assert torch.allclose(values, torch.tensor(sign * count * one.levels * one.step, dtype=torch.float64))
    assert all(sign * value > 0 for value in scalars.values())


def test_ranges_follow_from_the_layout_alone() -> None:
    head = next(spec for spec in LAYOUT.tensors if spec.name == "head.weight")
    found = {(one.vector, one.start): one for one in grid("modular:16").fields}
    step = found[DELTA, head.offset].step
    assert step * 511 == pytest.approx(REACH / math.sqrt(head.shape[1]))
    assert found[CONTROL, 0].step * ((2**31 - 1) // 64) == pytest.approx(AUXILIARY_RANGE)
    bias = next(spec for spec in LAYOUT.tensors if spec.name == "head.bias")
    assert (found[DELTA, bias.offset].part, found[DELTA, bias.offset].step) == (2, WIDE_STEP)
    assert {one.step for one in grid("modular:16:0.25").fields if one.part == 0} == {0.25 / 511}


def test_values_of_every_tensor_are_encoded_once() -> None:
    grids, (vectors, numbers) = grid("modular:32"), upload(1)
    decoded = grids.decode(grids.encode(vectors, numbers, weight=1.0, seed=1))[0]
    assert decoded[DELTA].shape == (LAYOUT.num_shared,)
    assert torch.allclose(decoded[DELTA].float(), vectors[DELTA], atol=1e-6)
    assert sum(size for _, size in grids.sizes) == LAYOUT.num_shared + LAYOUT.num_trainable + 500 + len(SCALARS)


def test_the_bytes_are_those_of_the_bits_but_for_the_few_wide_ones() -> None:
    layout = bind(resnet10(81, width=45)).layout
    assert 2.3e6 < layout.num_shared < 2.7e6
    for text, limit in (("modular:16", 0.51), ("modular:32", 1.01)):
        sizes = UploadGrid.of(modular(text), layout, scalars=SCALARS).sizes
        assert sum(bits // 8 * size for bits, size in sizes) <= limit * 4 * layout.num_shared


def test_weights_by_examples_are_multiplied_in_before_encoding() -> None:
    grids, weights = grid("modular:32", max_weight=1000.0), (5.0, 1000.0, 40.0)
    stores = [upload(seed) for seed in range(3)]
    total = summed([grids.encode(*store, weight=w, seed=1) for store, w in zip(stores, weights, strict=True)])
    vectors = grids.decode(total)[0]
    expected = sum(w * store[DELTA].double() for (store, _), w in zip(stores, weights, strict=True))
    assert isinstance(expected, Tensor)
    assert float((vectors[DELTA] - expected).norm() / expected.norm()) < 1e-5
    control = sum(store[CONTROL].double() for store, _ in stores)  # weighted equally
    assert torch.allclose(vectors[CONTROL], torch.as_tensor(control), atol=1e-5)


def test_weights_by_examples_have_no_room_in_16_bits() -> None:
    with pytest.raises(UsageError, match=r"modular:16 has no room for weights by examples: use modular:32, or"):
        grid("modular:16", max_weight=1000.0)


def test_sums_of_an_algorithm_without_a_model_change() -> None:
    grids = UploadGrid.of(modular("modular:16"), LAYOUT, has_delta=False, auxiliary={GRAM: (500, torch.float64)})
    assert grids.sizes == ((16, 0), (32, 0), (64, 500))
    stores = [{GRAM: upload(seed)[0][GRAM]} for seed in range(3)]
    total = summed([grids.encode(store, {}, weight=1.0, seed=1) for store in stores])
    expected = stores[0][GRAM] + stores[1][GRAM] + stores[2][GRAM]
    assert torch.allclose(grids.decode(total)[0][GRAM], expected, rtol=0, atol=1e-8)


def test_values_outside_the_range_are_reported_if_they_are_more_than_a_few(caplog: pytest.LogCaptureFixture) -> None:
    vectors, numbers = upload(1)
    with caplog.at_level(logging.WARNING):
        grid("modular:16").encode(vectors, numbers, weight=1.0, seed=1)
        assert not caplog.messages
        grid("modular:16:0.01").encode(vectors, numbers, weight=1.0, seed=1)
    assert "are outside the range of modular:16:0.01, and were clipped" in caplog.messages[0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_not_encoded(value: float) -> None:
    vectors, numbers = upload(1)
    vectors[DELTA][7] = value
    with pytest.raises(TrainingError, match=r"the values to send \(delta\) are not finite: training has diverged"):
        grid("modular:16").encode(vectors, numbers, weight=1.0, seed=1)


def exact_grid(summands: int = 4) -> UploadGrid:
    sums = {"gram": (5, torch.float64), "noisy": (2, torch.float32)}
    return UploadGrid.of(Modular(32, 0.0, summands), LAYOUT, has_delta=False, auxiliary=sums, is_exact=True)


def test_sums_over_photos_are_rounded_to_the_nearest_integer_whatever_the_seed() -> None:
    gram = torch.tensor([0.0, 1.0, -3.75, 1 / 3, 1e6 + 2**-33], dtype=torch.float64)
    vectors = {"gram": gram, "noisy": torch.tensor([0.1, -200.0])}
    one, other = (exact_grid().encode(vectors, {}, weight=1.0, seed=seed) for seed in (1, 2))
    assert all(np.array_equal(*parts) for parts in zip(one, other, strict=True))
    found, _ = exact_grid().decode(one)
    assert float((found["gram"] - gram).abs().max()) <= 2.0**-33
    assert float((found["noisy"] - vectors["noisy"]).abs().max()) <= 2.0**-33, "not bounded by the range of an update"
    assert [float(found["gram"][index]) for index in (0, 1, 2)] == [0.0, 1.0, -3.75]


@pytest.mark.parametrize(("value", "room"), [(2.0**28 + 1, 2), (2.0**29 + 1, 1), (-(2.0**28) - 1, 2)])
def test_a_sum_over_photos_that_is_too_large_is_an_error_with_the_codec_that_has_room(value: float, room: int) -> None:
    """4 summands leave 60 of 62 bits for each, 28 of them above the point."""
    vectors = {"gram": torch.tensor([value, 0, 0, 0, 0], dtype=torch.float64), "noisy": torch.zeros(2)}
    with pytest.raises(TrainingError, match=f"--codec-up modular:32:0:{room}$") as raised:
        exact_grid().encode(vectors, {}, weight=1.0, seed=1)
    assert raised.value.will_repeat
    codes = exact_grid(room).encode(vectors, {}, weight=1.0, seed=1)
    assert float(exact_grid(room).decode(codes)[0]["gram"][0]) == value
    fits = {**vectors, "gram": vectors["gram"].clamp(-(2.0**28), 2.0**28)}
    assert (
        float(exact_grid().decode(exact_grid().encode(fits, {}, weight=1.0, seed=1))[0]["gram"][0]) == fits["gram"][0]
    )
