"""The codecs: what they promise in their papers, measured; and every chain gives back what it should."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedshelf.compression.block import BLOCK
from fedshelf.compression.chain import Chain, decode, parse
from fedshelf.compression.feedback import compensate, residual
from fedshelf.compression.index_sets import decode as decode_indices
from fedshelf.compression.index_sets import encode as encode_indices
from fedshelf.compression.index_sets import specs as index_specs
from fedshelf.compression.modular import Modular
from fedshelf.compression.stage import CHUNK, MAX_MAGNITUDE
from fedshelf.compression.topk import largest
from fedshelf.core.encoded import Encoded

SEED = st.integers(0, 2**63 - 1)
SIZES = st.integers(0, 3000) | st.sampled_from([CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + BLOCK + 1, 5 * CHUNK + 7])
FRACTIONS = st.floats(1e-6, 1.0)
SPARSIFIERS = st.one_of(st.just(""), FRACTIONS.map("topk:{!r}+".format), FRACTIONS.map("randk:{!r}+".format))
QUANTIZERS = st.sampled_from(
    ["fp16", "bf16", "int8", "int4", "drive", "modular:8:1.0:3", "modular:16:1.0", "modular:32:8.0"]
)
LOSSLESS = st.sampled_from(["", "+zstd", "+zstd:1"])
CHAINS = st.builds(lambda a, b, c: parse(a + b + c), SPARSIFIERS, QUANTIZERS, LOSSLESS) | st.sampled_from(
    [parse(text) for text in ("none", "zstd", "topk:0.1", "randk:0.2+zstd")]
)


def normal(size: int, seed: int, *, spread: bool = False) -> Tensor:
    """A normal vector; with `spread`, its layers differ in scale by powers of ten."""
    generator = torch.Generator().manual_seed(seed % 2**31)
    vector = torch.randn(size, generator=generator)
    return (
        vector * 10 ** (torch.randn(size // 100 + 1, generator=generator).repeat_interleave(100)[:size])
        if spread
        else vector
    )


def squared(vector: Tensor) -> float:
    return float(vector.double().square().sum())


def round_trip(chain: Chain, vector: Tensor, seed: int) -> Tensor:
    return chain.decode(chain.encode(vector, seed=seed), size=vector.numel())


def bits(vector: Tensor) -> Tensor:
    return vector.view(torch.int32)


# every chain


@given(CHAINS, SIZES, SEED)
def test_every_chain_gives_back_a_finite_vector_of_the_same_size(chain: Chain, size: int, seed: int) -> None:
    encoded = chain.encode(normal(size, seed), seed=seed)
    decoded = decode(encoded, size=size)
    assert decoded.shape == (size,)
    assert decoded.dtype == torch.float32
    assert torch.isfinite(decoded).all()


@given(CHAINS, SIZES, SEED)
def test_the_parts_have_the_size_that_was_told_beforehand(chain: Chain, size: int, seed: int) -> None:
    encoded = chain.encode(normal(size, seed), seed=seed)
    if chain.lossless is None:
        assert encoded.num_bytes == chain.num_bytes(size)
    else:
        assert encoded.num_bytes <= chain.num_bytes(size)


@given(CHAINS)
def test_the_canonical_text_of_a_chain_names_that_chain(chain: Chain) -> None:
    assert parse(str(chain)) == chain


@given(CHAINS, st.integers(1, 200_000), SEED)
def test_the_same_vector_and_seed_give_the_same_bits_for_any_number_of_threads(
    chain: Chain, size: int, seed: int
) -> None:
    vector = normal(size, seed)
    one = chain.encode(vector, seed=seed)
    torch.set_num_threads(2)
    try:
        two = chain.encode(vector, seed=seed)
        assert torch.equal(bits(chain.decode(one)), bits(chain.decode(two)))
    finally:
        torch.set_num_threads(1)
    assert one.parts.keys() == two.parts.keys()
    assert all(torch.equal(one.parts[name].view(torch.uint8), two.parts[name].view(torch.uint8)) for name in one.parts)


@given(CHAINS, st.integers(1, 3000), SEED)
def test_encoding_changes_neither_its_input_nor_shares_memory_with_it(chain: Chain, size: int, seed: int) -> None:
    vector = normal(size, seed)
    before = vector.clone()
    encoded = chain.encode(vector, seed=seed)
    decoded = chain.decode(encoded)
    vector.fill_(7.0)
    assert torch.equal(bits(chain.decode(encoded)), bits(decoded))
    decoded.zero_()
    assert torch.equal(bits(chain.decode(encoded)), bits(round_trip(chain, before, seed)))


@given(st.integers(0, 5000), SEED, st.sampled_from(["none", "zstd", "zstd:9", "topk:1.0", "randk:1.0+zstd"]))
def test_chains_that_keep_every_float_are_lossless_to_the_last_bit(size: int, seed: int, text: str) -> None:
    vector = torch.from_numpy(np.random.default_rng(seed).integers(-(2**31), 2**31, size, dtype=np.int32)).view(
        torch.float32
    )
    vector = torch.where(torch.isfinite(vector) & (vector.abs() <= MAX_MAGNITUDE), vector, -0.0)
    assert torch.equal(bits(round_trip(parse(text), vector, seed)), bits(vector))


@given(CHAINS, st.integers(1, 3000), SEED)
def test_an_all_zero_vector_decodes_to_zeros(chain: Chain, size: int, seed: int) -> None:
    assert not round_trip(chain, torch.zeros(size), seed).any()


@given(
    st.sampled_from(["none", "int8", "int4", "bf16", "drive", "topk:0.3+int8", "topk:0.3+drive"]),
    st.integers(1, 600),
    SEED,
)
@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 1e-12, 1e12, 1e30])
def test_tiny_and_huge_values_neither_overflow_nor_grow(magnitude: float, text: str, size: int, seed: int) -> None:
    vector = normal(size, seed).clamp(-1, 1) * magnitude
    decoded = round_trip(parse(text), vector, seed)
    assert torch.isfinite(decoded).all()
    assert float(decoded.abs().max()) <= max(20 * magnitude, 2e-38)


# quantizers


@given(st.sampled_from([8, 4]), SIZES.filter(bool), SEED)
def test_block_quantization_errs_by_less_than_one_step_of_its_block(width: int, size: int, seed: int) -> None:
    vector = normal(size, seed, spread=True)
    decoded = round_trip(parse(f"int{width}"), vector, seed)
    levels = {8: 127, 4: 7}[width]
    for start in range(0, size, BLOCK):
        block = slice(start, start + BLOCK)
        step = float(vector[block].abs().max()) / levels * (1 + 2**-7)  # bfloat16 rounds up by less than 2^-7
        assert float((decoded[block] - vector[block]).abs().max()) <= step * (1 + 1e-5)


@pytest.mark.parametrize("text", ["int8", "int4", "modular:8:4.0:1", "modular:16:4.0", "drive", "int4+zstd"])
def test_unbiased_quantizers_average_to_the_vector(text: str) -> None:
    """The squared error of a mean over m seeds is that of one seed over m, within five of its standard deviations."""
    chain, vector, draws = parse(text), normal(2048, 1).clamp(-4, 4), 400
    assert chain.properties.unbiased
    decoded = torch.stack([round_trip(chain, vector, seed).double() for seed in range(draws)])
    one = float((decoded - vector).square().sum(1).mean())
    mean = squared(decoded.mean(0) - vector)
    assert mean == pytest.approx(one / draws, rel=5 * math.sqrt(2 / vector.numel()) + 0.05)


def test_a_deterministic_rounding_would_fail_the_test_above() -> None:
    chain, vector = parse("fp16"), normal(2048, 1)
    assert not chain.properties.unbiased
    decoded = torch.stack([round_trip(chain, vector, seed).double() for seed in range(4)])
    assert squared(decoded.mean(0) - vector) > 0.9 * float((decoded - vector).square().sum(1).mean())


def test_the_largest_value_of_a_block_is_not_biased_towards_zero() -> None:
    vector = torch.full((BLOCK,), 0.1)
    for text in ("int8", "int4"):
        decoded = torch.stack([round_trip(parse(text), vector, seed).double() for seed in range(200)])
        error = float(decoded.mean() - vector.double().mean())
        deviation = float(decoded.std()) / math.sqrt(decoded.numel())
        assert abs(error) <= 5 * deviation + 0.1 * 2**-16


@pytest.mark.parametrize("size", [1 << 16, 3 << 16, 100_003])
def test_drive_errs_by_pi_half_minus_one_on_a_normal_vector_and_by_an_m_th_of_it_on_average(size: int) -> None:
    vector, chain = normal(size, 3), parse("drive")
    decoded = [round_trip(chain, vector, seed) for seed in range(10)]
    assert squared(decoded[0] - vector) / squared(vector) == pytest.approx(math.pi / 2 - 1, rel=0.03)
    mean = torch.stack(decoded).mean(0)
    assert squared(mean - vector) / squared(vector) == pytest.approx((math.pi / 2 - 1) / 10, rel=0.05)


def test_drive_is_as_good_on_a_vector_of_very_unequal_values() -> None:
    vector = normal(1 << 16, 4).sign() * torch.logspace(-6, 0, 1 << 16)
    assert squared(round_trip(parse("drive"), vector, 5) - vector) / squared(vector) == pytest.approx(0.571, rel=0.1)


def test_drive_after_a_sparsifier_errs_by_one_minus_two_over_pi() -> None:
    vector = normal(1 << 16, 3)
    error = squared(round_trip(parse("topk:1.0+drive"), vector, 5) - vector) / squared(vector)
    assert error == pytest.approx(1 - 2 / math.pi, rel=0.03)


@given(st.integers(1, 5000), SEED)
def test_drive_after_a_sparsifier_is_a_contraction_for_any_vector(size: int, seed: int) -> None:
    vector = normal(size, seed, spread=True)
    assert squared(round_trip(parse("topk:1.0+drive"), vector, seed) - vector) <= squared(vector) * (1 + 1e-5)


@given(st.sampled_from([(8, 3), (16, 64), (16, 500), (32, 64)]), st.integers(1, 300), SEED, st.integers(1, 40))
def test_sums_of_modular_codes_decode_to_the_sum(form: tuple[int, int], size: int, seed: int, clients: int) -> None:
    width, summands = form
    clients = min(clients, summands)
    chain = parse(f"modular:{width}:0.5:{summands}")
    vectors = [normal(size, seed + client).clamp(-0.5, 0.5) for client in range(clients)]
    encoded = [chain.encode(vector, seed=client) for client, vector in enumerate(vectors)]
    total = torch.stack([each.parts["codes"] for each in encoded]).sum(0, dtype=encoded[0].parts["codes"].dtype)
    decoded = chain.decode(Encoded(codec=str(chain), size=size, parts={"codes": total}))
    assert torch.allclose(decoded, torch.stack([chain.decode(each) for each in encoded]).sum(0), atol=1e-4)
    stage = chain.quantizer
    assert isinstance(stage, Modular)
    assert float((decoded - torch.stack(vectors).sum(0)).abs().max()) <= clients * stage.step * 1.0001 + 1e-4


def test_masks_added_modulo_the_width_cancel_without_a_trace() -> None:
    chain, generator = parse("modular:16:1.0"), torch.Generator().manual_seed(1)
    left, right = (chain.encode(normal(999, seed), seed=seed).parts["codes"] for seed in (1, 2))
    mask = torch.randint(-(2**15), 2**15, (999,), dtype=torch.int16, generator=generator)
    assert torch.equal((left + mask) + (right - mask), left + right)


def test_the_full_head_room_of_modular_codes_is_used_and_not_overrun() -> None:
    for value in (1.0, -1.0, 5.0):  # the last is clipped
        chain = parse("modular:8:1.0:3")
        codes = [chain.encode(torch.full((1000,), value), seed=seed).parts["codes"] for seed in range(3)]
        total = codes[0] + codes[1] + codes[2]
        decoded = chain.decode(Encoded(codec=str(chain), size=1000, parts={"codes": total}))
        assert torch.allclose(decoded, torch.full((1000,), 3 * max(-1.0, min(1.0, value))))


@given(st.sampled_from(["int8", "int4"]), st.integers(1, 5000), SEED)
def test_integers_after_a_sparsifier_contract_every_single_value(text: str, size: int, seed: int) -> None:
    vector = normal(size, seed, spread=True)
    decoded = round_trip(parse(f"topk:1.0+{text}"), vector, seed)
    assert bool(((decoded - vector).abs() <= vector.abs() * (1 + 1e-5)).all())


# sparsifiers


@given(st.integers(1, 4000), SEED, FRACTIONS)
def test_topk_keeps_exactly_the_largest_and_is_a_contraction(size: int, seed: int, fraction: float) -> None:
    vector = normal(size, seed, spread=True)
    decoded = round_trip(parse(f"topk:{fraction!r}"), vector, seed)
    count = min(size, max(1, round(fraction * size)))
    kept = decoded != 0
    assert int(kept.sum()) == count
    assert torch.equal(decoded[kept], vector[kept])
    assert kept.all() or float(vector[kept].abs().min()) >= float(vector[~kept].abs().max())
    assert squared(vector - decoded) <= (1 - count / size) * squared(vector) * (1 + 1e-6)


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 3))
def test_topk_takes_the_first_of_equal_magnitudes(size: int, count: int, distinct: int) -> None:
    count = min(count, size)
    vector = (torch.arange(size) * 7 % (distinct + 1)).float() * torch.where(torch.arange(size) % 2 == 0, 1.0, -1.0)
    expected = sorted(sorted(range(size), key=lambda index: (-abs(float(vector[index])), index))[:count])
    assert largest(vector.numpy(), count).tolist() == expected


@pytest.mark.parametrize("fraction", [1e-5, 0.001, 0.01, 0.1, 0.5])
@pytest.mark.parametrize("kind", ["normal", "mostly zero", "sorted", "few values"])
def test_the_sample_that_narrows_the_search_for_the_largest_does_not_change_the_choice(
    kind: str, fraction: float
) -> None:
    size = 400_000
    vector = {
        "normal": normal(size, 1),
        "mostly zero": normal(size, 2) * (torch.arange(size) % 997 == 0),
        "sorted": torch.linspace(-1, 2, size),
        "few values": normal(size, 3).round(),
    }[kind]
    count = round(fraction * size)
    expected = torch.sort(vector.abs(), descending=True, stable=True).indices[:count].sort().values
    assert largest(vector.numpy(), count).tolist() == expected.tolist()


@given(st.integers(1, 4000), SEED, FRACTIONS)
def test_randk_keeps_as_many_as_it_says_unchanged(size: int, seed: int, fraction: float) -> None:
    vector = normal(size, seed)
    decoded = round_trip(parse(f"randk:{fraction!r}"), vector, seed)
    kept = decoded != 0
    assert int(kept.sum()) == min(size, max(1, round(fraction * size)))
    assert torch.equal(decoded[kept], vector[kept])


@pytest.mark.parametrize(("size", "fraction"), [(10, 0.3), (97, 0.9), (1000, 0.05)])
def test_randk_keeps_every_value_equally_often_and_contracts_by_its_fraction_on_average(
    size: int, fraction: float
) -> None:
    draws, vector = 4000, normal(size, 1)
    kept = torch.stack([round_trip(parse(f"randk:{fraction}"), vector, seed) != 0 for seed in range(draws)])
    probability = round(fraction * size) / size
    deviation = math.sqrt(probability * (1 - probability) / draws)
    assert float((kept.double().mean(0) - probability).abs().max()) <= 5 * deviation
    left = (~kept).double() @ vector.double().square()
    assert float(left.mean()) == pytest.approx((1 - probability) * squared(vector), rel=0.05)


@given(st.integers(1, 4000), SEED, FRACTIONS, st.sampled_from(["", "+int8", "+modular:16:1.0"]))
def test_clients_of_one_support_seed_send_the_same_indices_and_round_differently(
    size: int, seed: int, fraction: float, quantizer: str
) -> None:
    chain = parse(f"randk:{fraction!r}{quantizer}")
    ones = [chain.encode(torch.full((size,), 0.3), seed=client, support_seed=seed) for client in (1, 2)]
    assert torch.equal(ones[0].parts["support_seed"], ones[1].parts["support_seed"])
    left, right = (chain.decode(each) for each in ones)
    assert torch.equal(left != 0, right != 0)
    if quantizer == "+modular:16:1.0" and int((left != 0).sum()) > 100:
        assert not torch.equal(left, right)


def test_randk_with_modular_codes_adds_up_on_the_common_support() -> None:
    chain = parse("randk:0.1+modular:16:4.0")
    assert chain.properties.linear
    assert chain.properties.modular
    encoded = [chain.encode(normal(5000, client).clamp(-4, 4), seed=client, support_seed=9) for client in range(20)]
    codes = torch.stack([each.parts["codes"] for each in encoded]).sum(0, dtype=torch.int16)
    parts = {"support_seed": encoded[0].parts["support_seed"], "codes": codes}
    total = chain.decode(Encoded(codec=str(chain), size=5000, parts=parts))
    assert torch.allclose(total, torch.stack([chain.decode(each) for each in encoded]).sum(0), atol=1e-4)


@given(st.integers(1, 5000), st.data())
def test_any_set_of_indices_is_read_as_it_was_written(size: int, data: st.DataObject) -> None:
    chosen = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=200))
    indices = np.array(sorted(chosen), np.int64)
    parts = encode_indices(indices, size)
    assert {name: (part.dtype, part.numel()) for name, part in parts.items()} == index_specs(size, indices.size)
    assert decode_indices(parts, size, indices.size).tolist() == indices.tolist()


@given(st.integers(1, 2**31 - 1), st.floats(0, 1))
def test_indices_cost_at_most_a_bit_more_each_than_the_least_possible(size: int, share: float) -> None:
    count = max(1, int(share * size))
    entropy = (math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)) / math.log(2)
    paid = 8 * sum(length for _, length in index_specs(size, count).values())
    assert paid <= min(size, entropy + count) + 32


# error feedback


@given(st.sampled_from(["topk:0.05", "randk:0.1", "topk:0.1+int4+zstd", "topk:0.2+drive", "randk:0.3+int8"]), SEED)
def test_with_error_feedback_what_was_sent_and_what_is_remembered_sum_to_all_inputs(text: str, seed: int) -> None:
    chain, memory = parse(text), None
    sent, total = torch.zeros(700, dtype=torch.float64), torch.zeros(700, dtype=torch.float64)
    for round_number in range(12):
        vector = normal(700, seed + round_number)
        compensated = compensate(vector, memory)
        decoded = round_trip(chain, compensated, round_number)
        memory = residual(compensated, decoded)
        sent += decoded
        total += vector
    assert memory is not None
    assert torch.allclose(sent + memory, total, atol=1e-4)


@pytest.mark.parametrize("text", ["topk:0.1", "randk:0.1", "topk:0.1+int8", "topk:0.1+int4", "topk:0.1+drive"])
def test_the_memory_of_error_feedback_stays_bounded_by_the_contraction(text: str) -> None:
    """Karimireddy et al. 2019, lemma 3: E||e||² <= 4 (1 - delta) / delta² · max ||x||², delta = k/n here."""
    chain, memory = parse(text), None
    for round_number in range(200):
        compensated = compensate(normal(500, round_number), memory)
        memory = residual(compensated, round_trip(chain, compensated, round_number))
    assert memory is not None
    assert squared(memory) <= 4 * 0.9 / 0.1**2 * 500 * 1.5
