"""The byte budget: never exceeded, never wasted on a worse codec."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedshelf.compression import budget
from fedshelf.compression.budget import admits, fit, ladder, least_bytes
from fedshelf.compression.chain import decode, parse
from fedshelf.core.errors import FedShelfError, UsageError

SEED = st.integers(0, 2**63 - 1)


def layers(size: int, seed: int) -> Tensor:
    """Normal values whose scale differs from layer to layer."""
    generator = torch.Generator().manual_seed(seed % 2**31)
    scales = 10 ** torch.randn(size // 100 + 1, generator=generator)
    return torch.randn(size, generator=generator) * scales.repeat_interleave(100)[:size]


def squared_error(decoded: Tensor, vector: Tensor) -> float:
    return float((decoded - vector).double().square().sum())


@given(st.integers(0, 5000), st.integers(0, 24_000), SEED, st.booleans())
def test_the_budget_is_never_exceeded_and_every_possible_one_is_met(
    size: int, max_bytes: int, seed: int, feedback: bool
) -> None:
    vector = layers(size, seed)
    if max_bytes < least_bytes(size, error_feedback=feedback):
        try:
            encoded = fit(vector, max_bytes=max_bytes, seed=seed, error_feedback=feedback)
        except UsageError as error:
            assert f"at least {least_bytes(size, error_feedback=feedback):,}" in str(error)  # noqa: PT017
            return
    else:
        encoded = fit(vector, max_bytes=max_bytes, seed=seed, error_feedback=feedback)
    assert encoded.num_bytes <= max_bytes
    assert decode(encoded, size=size).shape == (size,)
    assert admits(parse(encoded.codec), error_feedback=feedback)
    assert feedback or not parse(encoded.codec).properties.needs_error_feedback


@given(st.integers(1, 3000), st.integers(50, 12_000), SEED)
def test_no_chain_of_the_ladder_that_fits_errs_less_than_the_chosen_one(size: int, max_bytes: int, seed: int) -> None:
    vector = layers(size, seed)
    chosen = squared_error(decode(fit(vector, max_bytes=max_bytes, seed=seed)), vector)
    for chain in ladder(size, max_bytes):
        encoded = chain.encode(vector, seed=seed)
        if encoded.num_bytes <= max_bytes:
            assert chosen <= squared_error(chain.decode(encoded), vector)


@given(st.integers(1, 10**8), st.integers(0, 10**9))
def test_the_ladder_without_zstd_fits_for_certain_and_topk_fills_the_budget(size: int, max_bytes: int) -> None:
    for chain in ladder(size, max_bytes):
        assert admits(chain)
        if chain.lossless is None:
            assert chain.num_bytes(size) <= max_bytes
        if chain.sparsifier is not None and chain.lossless is None and "drive" not in str(chain):  # it pads to 1,024
            assert chain.num_bytes(size) >= 0.99 * max_bytes - 20 or chain.sparsifier.count(size) == size


@pytest.mark.parametrize("bits", [40, 18, 9, 4.5, 1.5, 0.3, 0.02])
def test_a_long_vector_is_judged_by_a_sample_and_kept_to_its_budget_all_the_same(bits: float) -> None:
    vector = layers(400_000, 1)
    max_bytes = int(len(vector) * bits / 8)
    encoded = fit(vector, max_bytes=max_bytes, seed=3)
    assert encoded.num_bytes <= max_bytes
    chosen = squared_error(decode(encoded), vector)
    fitting = [
        each
        for chain in ladder(len(vector), max_bytes)
        if (each := chain.encode(vector, seed=3)).num_bytes <= max_bytes
    ]
    assert chosen <= 1.1 * min(squared_error(decode(each), vector) for each in fitting)


def test_float32_is_chosen_where_it_fits_and_fewer_bytes_where_they_lose_nothing() -> None:
    vector = layers(1000, 1)
    assert fit(vector, max_bytes=4000, seed=1).codec in ("none", "zstd")
    assert fit(torch.zeros(1000), max_bytes=4000, seed=1).num_bytes < 100


def test_a_larger_budget_is_never_worse() -> None:
    vector = layers(4000, 2)
    errors = [
        squared_error(decode(fit(vector, max_bytes=each, seed=1)), vector) for each in (50, 200, 800, 3200, 9000, 16000)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_a_value_that_float16_cannot_hold_leaves_the_other_codecs() -> None:
    vector = layers(1000, 1)
    vector[0] = 1e6
    assert fit(vector, max_bytes=2000, seed=1).num_bytes <= 2000


def test_a_vector_that_is_not_finite_is_an_error_of_its_own_and_not_of_the_budget() -> None:
    vector = layers(1000, 1)
    vector[3] = torch.inf
    for max_bytes in (100, 4000):
        with pytest.raises(FedShelfError, match="not finite"):
            fit(vector, max_bytes=max_bytes, seed=1)


def test_a_vector_too_large_for_all_codecs_that_fit_says_so() -> None:
    vector = layers(1000, 1)
    vector[3] = 1e35
    assert fit(vector, max_bytes=4000, seed=1).codec in ("none", "zstd")
    with pytest.raises(FedShelfError, match="diverged"):
        fit(vector, max_bytes=1000, seed=1)


def test_chains_outside_the_ladder_are_not_admitted() -> None:
    for text in ("randk:0.1", "topk:0.1+modular:16:1.0", "modular:16:1.0", "int8+zstd:19", "randk:0.1+int8"):
        assert not admits(parse(text))
    assert not admits(parse("topk:0.1+int8"), error_feedback=False)


def test_the_sample_covers_the_whole_vector() -> None:
    vector = torch.arange(1_000_000.0)
    sample = budget._sample(vector, seed=5)
    assert sample.numel() == 1 << 18
    assert sample.min() < 20_000
    assert sample.max() > 980_000
    assert sample.unique().numel() == sample.numel()
