"""The fast codecs against slow ones written straight from the papers, and the examples that papers give."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedshelf.compression.chain import parse
from fedshelf.compression.drive import _blocks
from fedshelf.compression.feedback import compensate, residual
from fedshelf.compression.randk import support
from fedshelf.compression.registry import KINDS
from fedshelf.core.rng import Rng

PAGE = Path(__file__).resolve().parents[3] / "docs" / "explanation" / "compression.md"


def sylvester(dimension: int) -> Tensor:
    """The Hadamard matrix by its definition: H_2d = [[H, H], [H, -H]]."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < dimension:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


@pytest.mark.parametrize("size", [8, 64, 200, 512, 1024, 2048, 1024 + 300, 4096 + 2048 + 5])
@pytest.mark.parametrize("unbiased", [True, False])
def test_drive_is_the_papers_estimator_with_an_explicit_hadamard_matrix(size: int, unbiased: bool) -> None:
    chain = parse("drive" if unbiased else "topk:1.0+drive")
    vector = torch.randn(size, generator=torch.Generator().manual_seed(size))
    decoded = chain.decode(chain.encode(vector, seed=7))
    for block in _blocks(size, Rng(7).fork(purpose="quantizer").seed):
        x = torch.zeros(block.dimension, dtype=torch.float64)
        part = vector[block.start : block.start + block.dimension]
        x[: len(part)] = part
        d = 1 - 2 * torch.from_numpy(np.unpackbits(block.flips)).double()
        h = sylvester(block.dimension)
        y = h @ (d * x)
        scale = x.square().sum() / y.abs().sum() if unbiased else y.abs().sum() / block.dimension**2
        expected = (scale * d * (h @ torch.where(y < 0, -1.0, 1.0).double()))[: len(part)]
        assert torch.allclose(
            decoded[block.start : block.start + block.dimension].double(), expected, rtol=1e-5, atol=1e-6
        )


def test_drive_covers_the_vector_with_powers_of_two_and_pads_less_than_1024() -> None:
    for size in (*range(1, 300), 1023, 1024, 1025, 65535, 65536, 65537, 200_000, 3 * 65536 + 1500):
        blocks = list(_blocks(size, 1))
        covered = sum(block.dimension for block in blocks)
        assert size <= covered < size + 1024
        assert [block.start for block in blocks] == np.cumsum([0, *(block.dimension for block in blocks[:-1])]).tolist()


@pytest.mark.parametrize(("text", "levels"), [("int8", 127), ("int4", 7)])
def test_the_largest_of_a_block_never_needs_a_code_beyond_the_last_level(text: str, levels: int) -> None:
    """Thousands of blocks whose values all have the largest magnitude, of random mantissas and exponents."""
    generator = torch.Generator().manual_seed(1)
    largest = torch.rand(4000, generator=generator).add(0.5) * 2.0 ** torch.randint(
        -120, 90, (4000,), generator=generator
    )
    vector = (largest[:, None] * torch.randn(4000, 256, generator=generator).sign()).reshape(-1)
    chain = parse(text)
    encoded = chain.encode(vector, seed=3)
    codes = encoded.parts["codes"]
    if text == "int4":
        codes = torch.stack([codes & 15, codes >> 4], 1).reshape(-1).to(torch.int8) - 8
    assert int(codes.abs().max()) <= levels
    assert torch.equal(codes.sign().float(), vector.sign())
    step = encoded.parts["scales"].float().repeat_interleave(256)
    assert torch.equal(chain.decode(encoded), codes * step)


def test_the_first_of_two_four_bit_codes_is_in_the_low_half_of_its_byte() -> None:
    encoded = parse("int4").encode(torch.tensor([7.0, 0.0, -7.0]), seed=1)
    byte = int(encoded.parts["codes"][0])
    assert (byte & 15, byte >> 4) in {(15, 8), (14, 8)}  # 7 + 8 (or a level less, by chance) and 0 + 8
    assert encoded.parts["codes"].numel() == 2


def test_a_stochastic_rounding_goes_up_as_often_as_the_value_is_above_the_level_below() -> None:
    chain, size = parse("modular:16:511.0"), 200_000  # a step of one
    for value in (0.25, -0.25, 3.9, -0.001):
        codes = chain.encode(torch.full((size,), value), seed=5).parts["codes"].double()
        above = value - math.floor(value)
        assert set(codes.unique().tolist()) == {math.floor(value), math.floor(value) + 1}
        assert float(codes.mean()) - math.floor(value) == pytest.approx(
            above, abs=5 * math.sqrt(above * (1 - above) / size)
        )


@pytest.mark.parametrize(("size", "count"), [(1, 1), (10, 10), (10, 3), (1000, 999), (10**9, 7), (2**31 - 1, 1000)])
def test_a_support_is_increasing_and_inside_the_vector(size: int, count: int) -> None:
    for seed in range(20):
        indices = support(seed, size, count)
        assert indices.size == count
        assert np.all(np.diff(indices) > 0)
        assert indices[0] >= 0
        assert indices[-1] < size


def _top_1_descent(*, with_feedback: bool) -> float:
    """Beznosikov et al. 2020, "On Biased Compression for Distributed Learning", example 1: distance to the optimum."""
    slopes = torch.tensor([[-3.0, 2.0, 2.0], [2.0, -3.0, 2.0], [2.0, 2.0, -3.0]])
    chain = parse(f"topk:{1 / 3!r}")
    memory: list[Tensor | None] = [None, None, None]
    w = torch.ones(3)
    for round_number in range(2000):
        sent = torch.zeros(3)
        for client, a in enumerate(slopes):
            delta = -0.01 * (2 * (a @ w) * a + w / 2)
            compensated = compensate(delta, memory[client] if with_feedback else None)
            decoded = chain.decode(chain.encode(compensated, seed=round_number))
            memory[client] = residual(compensated, decoded)
            sent += decoded / 3
        w = w + sent
        if w.norm() > 1e6:
            break
    return float(w.norm())


def test_error_feedback_converges_where_top_1_without_it_diverges() -> None:
    assert _top_1_descent(with_feedback=False) > 1e6
    assert _top_1_descent(with_feedback=True) < 1e-2


def test_the_documentation_tells_of_every_codec_what_the_code_declares() -> None:
    rows = [line.split("|")[1:-1] for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    examples = {"topk": "topk:0.1", "randk": "randk:0.1", "modular": "modular:16:1.0"}
    told = {name.split(":")[0]: row[1:] for row in rows if len(row) == 5 for name in re.findall("`([^`]+)`", row[0])}
    assert told.keys() == {"none", *(name for registry in KINDS.values() for name in registry)}
    for name, (_, unbiased, linear, feedback) in told.items():
        properties = parse(examples.get(name, name)).properties
        assert properties.unbiased == unbiased.strip().startswith(("yes", "inside"))
        assert properties.linear == linear.strip().startswith(("yes", "modulo", "with"))
        assert properties.needs_error_feedback == feedback.strip().startswith("yes")


@pytest.mark.parametrize(
    ("text", "bits"), [("int8", 8.06), ("int4", 4.06), ("drive", 1.0005), ("topk:0.01+int8", 0.166)]
)
def test_the_documented_bits_per_value_are_those_of_large_models(text: str, bits: float) -> None:
    assert 8 * parse(text).num_bytes(10_000_000) / 10_000_000 == pytest.approx(bits, rel=2e-3)
