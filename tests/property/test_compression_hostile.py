"""Whatever a hostile client writes into an encoded vector: it is refused, or it is a vector; nothing else happens."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedshelf.compression.chain import decode, parse
from fedshelf.core.encoded import Encoded
from fedshelf.core.errors import RefusedError
from tests.examples import examples

SIZE = 600
TEXTS = [
    "none", "fp16", "bf16", "int8", "int4", "drive", "modular:8:1.0:1", "topk:0.02", "topk:0.5+int8", "randk:0.1+drive",
    "zstd", "int8+zstd", "topk:0.02+int4+zstd", "topk:0.4+fp16+zstd", "drive+zstd",
]  # fmt: skip
TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def honest(text: str) -> Encoded:
    vector = torch.randn(SIZE, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    return parse(text).encode(vector, seed=1)


@st.composite
def altered(draw: st.DrawFn, part: Tensor) -> Tensor:
    """The bytes of `part` with some overwritten, cut or added to, read as any type."""
    data = bytearray(part.view(torch.uint8).numpy().tobytes())
    for _ in range(draw(st.integers(0, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    data = draw(st.sampled_from([data, data, data, data[:-1], data[: len(data) // 2], data + data, data + b"\0"]))
    dtype = draw(st.sampled_from([part.dtype] * 12 + TYPES))
    usable = len(data) // dtype.itemsize * dtype.itemsize
    return torch.frombuffer(data[:usable], dtype=dtype) if usable else torch.empty(0, dtype=dtype)


@st.composite
def attacks(draw: st.DrawFn) -> Encoded:
    encoded = honest(draw(st.sampled_from(TEXTS)))
    parts = {name: draw(altered(part)) if draw(st.booleans()) else part for name, part in encoded.parts.items()}
    if draw(st.integers(0, 9)) == 0:
        parts.pop(draw(st.sampled_from(sorted(parts))))
    if draw(st.integers(0, 9)) == 0:
        parts[draw(st.sampled_from(["values", "codes", "scales", "codes.zst", "values.zst", ".zst", ""]))] = (
            torch.zeros(9)
        )
    size = draw(st.sampled_from([SIZE] * 6 + [0, 1, SIZE - 1, SIZE + 1, 2**31 - 1, 2**40]))
    codec = draw(st.sampled_from([encoded.codec] * 6 + TEXTS) | st.text(max_size=12))
    return Encoded(codec=codec, size=size, parts=parts)


@settings(max_examples=examples(600))
@given(attacks())
def test_what_a_hostile_client_sends_is_refused_or_is_a_finite_vector_of_the_models_size(attack: Encoded) -> None:
    try:
        decoded = decode(attack, size=SIZE)
    except RefusedError:
        return
    assert decoded.shape == (SIZE,)
    assert decoded.dtype == torch.float32
    assert torch.isfinite(decoded).all()


@pytest.mark.parametrize("text", TEXTS)
def test_every_bit_of_every_part_may_flip(text: str) -> None:
    encoded = honest(text)
    for name, part in encoded.parts.items():
        for bit in range(0, 8 * part.numel() * part.element_size(), 7):
            flipped = part.clone()
            flipped.view(torch.uint8)[bit // 8] ^= 1 << bit % 8
            try:
                decoded = decode(dataclasses.replace(encoded, parts={**encoded.parts, name: flipped}), size=SIZE)
            except RefusedError:
                continue
            assert decoded.shape == (SIZE,)
            assert torch.isfinite(decoded).all()
