"""The mean over clients: exact, and the same however it is computed and in whatever order uploads arrive."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedshelf.algorithms.aggregation import fold, weighted
from fedshelf.algorithms.reduce import weighted_mean
from tests.examples import examples
from tests.worlds import World, with_batch_norm


def uploads(seed: int, clients: int, size: int) -> tuple[list[Tensor], list[float]]:
    draw = torch.Generator().manual_seed(seed)
    deltas = [torch.randn(size, generator=draw) * 10.0 ** float(i % 5 - 2) for i in range(clients)]
    weights = [float(n) for n in torch.randint(1, 10_000, (clients,), generator=draw)]
    return deltas, weights


SEEDS, CLIENTS, SIZES = st.integers(0, 2**30), st.integers(1, 9), st.integers(1, 300)


@given(seed=SEEDS, clients=CLIENTS, size=SIZES)
def test_the_fold_equals_the_plain_mean_in_float64(seed: int, clients: int, size: int) -> None:
    deltas, weights = uploads(seed, clients, size)
    stacked = torch.stack(deltas).double()
    plain = (stacked * torch.tensor(weights, dtype=torch.float64)[:, None]).sum(0) / math.fsum(weights)
    torch.testing.assert_close(fold(deltas, weights, weighted_mean), plain.float(), rtol=1e-6, atol=1e-7)


@given(seed=SEEDS, clients=CLIENTS, size=SIZES, block=st.integers(1, 400))
def test_the_fold_is_the_same_to_the_last_bit_for_any_block(seed: int, clients: int, size: int, block: int) -> None:
    deltas, weights = uploads(seed, clients, size)
    normalized = [weight / sum(weights) for weight in weights]
    whole = weighted_mean(deltas, normalized)
    assert torch.equal(fold(deltas, weights, weighted_mean, block=block), whole)


@given(seed=SEEDS, clients=CLIENTS)
def test_only_the_ratio_of_weights_counts(seed: int, clients: int) -> None:
    deltas, weights = uploads(seed, clients, 50)
    larger = [weight * 8 for weight in weights]
    assert torch.equal(fold(deltas, weights, weighted_mean), fold(deltas, larger, weighted_mean))


def test_the_fold_leaves_the_uploads_as_they_are() -> None:
    deltas, weights = uploads(1, 3, 40)
    before = [delta.clone() for delta in deltas]
    fold(deltas, weights, weighted_mean, block=7)
    assert all(torch.equal(delta, kept) for delta, kept in zip(deltas, before, strict=True))


@given(
    values=st.dictionaries(st.text(max_size=3), st.one_of(st.none(), st.floats(-1e6, 1e6)), max_size=8),
    seed=st.integers(0, 99),
)
def test_the_weighted_metric_skips_clients_without_a_number(values: dict[str, float | None], seed: int) -> None:
    weights = {name: float(random.Random(f"{seed}{name}").randint(1, 50)) for name in values}
    there = {name: value for name, value in values.items() if value is not None}
    result = weighted((value, weights[name]) for name, value in values.items())
    if not there:
        assert result is None
        return
    expected = math.fsum(v * weights[n] for n, v in there.items()) / math.fsum(weights[n] for n in there)
    assert result == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_a_metric_of_clients_without_weight_is_absent_rather_than_a_division_by_zero() -> None:
    assert weighted([(0.5, 0.0)]) is None


@pytest.fixture(scope="module")
def in_name_order() -> Tensor:
    world = World(names=("a", "b", "c", "d"), module=with_batch_norm)
    world.run()
    return world.final


@settings(max_examples=examples(15))
@given(seed=st.integers(0, 2**30), delays=st.lists(st.floats(0, 50), min_size=4, max_size=4))
def test_the_order_of_arrival_changes_not_one_bit(in_name_order: Tensor, seed: int, delays: list[float]) -> None:
    names = ("a", "b", "c", "d")
    order = dict(zip(names, delays, strict=True))
    world = World(names=names, module=with_batch_norm, order=random.Random(seed), delays=order)
    world.run()
    assert torch.equal(world.final, in_name_order)
