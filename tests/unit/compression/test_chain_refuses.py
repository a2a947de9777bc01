"""What encoders and decoders refuse, and that a refusal costs no memory."""

import dataclasses
import math
import tracemalloc
from collections.abc import Callable

import pytest
import torch
import zstandard
from torch import Tensor

from fedshelf.compression.chain import decode, parse
from fedshelf.core.encoded import Encoded
from fedshelf.core.errors import FedShelfError, RefusedError

ALL = [
    "none",
    "fp16",
    "bf16",
    "int8",
    "int4",
    "drive",
    "modular:16:1.0",
    "topk:0.1",
    "topk:0.1+int8+zstd",
    "randk:0.1",
    "zstd",
]


def vector(size: int = 1000) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def changed(encoded: Encoded, **parts: Tensor | None) -> Encoded:
    """The same with parts replaced, or left out where they are None."""
    merged = {name: part for name, part in {**encoded.parts, **parts}.items() if part is not None}
    return dataclasses.replace(encoded, parts=merged)


@pytest.mark.parametrize("text", ALL)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_vector_that_is_not_finite_is_not_encoded(text: str, value: float) -> None:
    given = vector()
    given[700] = value
    with pytest.raises(FedShelfError, match="not finite"):
        parse(text).encode(given, seed=1)


@pytest.mark.parametrize("text", ["int8", "drive", "topk:0.1", "modular:16:1.0"])
def test_a_vector_too_large_for_the_arithmetic_is_not_encoded(text: str) -> None:
    with pytest.raises(FedShelfError, match="diverged"):
        parse(text).encode(torch.tensor([1e31]), seed=1)


def test_a_value_that_float16_cannot_hold_is_an_error_and_not_infinity() -> None:
    with pytest.raises(FedShelfError, match="Use bf16"):
        parse("fp16").encode(torch.tensor([1.0, -70000.0]), seed=1)


@pytest.mark.parametrize(
    "given", [torch.zeros(2, 2), torch.zeros(3, dtype=torch.float64), torch.zeros(3, device="meta")]
)
def test_only_float32_vectors_on_the_cpu_are_encoded(given: Tensor) -> None:
    with pytest.raises(FedShelfError, match="only float32 vectors"):
        parse("int8").encode(given, seed=1)


def test_a_strided_view_is_encoded_as_its_values() -> None:
    given = vector(2000)[::2]
    assert torch.equal(parse("none").decode(parse("none").encode(given, seed=1)), given)


@pytest.mark.parametrize("text", ALL)
def test_a_missing_an_extra_or_a_renamed_part_is_refused(text: str) -> None:
    encoded = parse(text).encode(vector(), seed=1)
    for name, part in encoded.parts.items():
        for parts in ({name: None}, {"more": part}, {name: None, "other": part}, {name + ".zst": part}):
            with pytest.raises(RefusedError):
                decode(changed(encoded, **parts))


@pytest.mark.parametrize("text", ALL)
def test_a_part_of_another_type_length_or_shape_is_refused(text: str) -> None:
    encoded = parse(text).encode(vector(), seed=1)
    for name, part in encoded.parts.items():
        wrong = [
            part[:-1],
            torch.cat([part, part[-1:]]),
            part[:0],
            part.reshape(1, -1),
            part.to(torch.float64),
            part.to(torch.bool),
        ]
        for each in wrong:
            with pytest.raises(RefusedError):
                decode(changed(encoded, **{name: each}))


@pytest.mark.parametrize("text", ALL)
@pytest.mark.parametrize("size", [-1, 0, 1, 999, 1001, 10**6, 2**31, 2**63, True, 1000.0, None])
def test_a_claimed_size_that_does_not_fit_the_parts_is_refused(text: str, size: int) -> None:
    encoded = dataclasses.replace(parse(text).encode(vector(), seed=1), size=size)
    with pytest.raises(RefusedError):
        decode(encoded, size=1000)
    if text in ("none", "fp16", "bf16", "int8", "zstd", "modular:16:1.0"):  # others have parts that fit a few sizes
        with pytest.raises(RefusedError):
            decode(encoded)


@pytest.mark.parametrize("codec", ["int4", "gzip", "", "int8+zstd:3", "INT8", "int8 ", "topk:0", "x" * 10**6, None, 8])
def test_an_unknown_or_another_codec_is_refused(codec: str) -> None:
    encoded = dataclasses.replace(parse("int8").encode(vector(), seed=1), codec=codec)
    with pytest.raises(RefusedError) as caught:
        decode(encoded)
    assert len(str(caught.value)) < 300
    with pytest.raises(RefusedError):
        parse("int8").decode(encoded)


def test_a_codec_that_the_run_does_not_allow_is_refused_and_an_allowed_one_taken() -> None:
    encoded = parse("int8").encode(vector(), seed=1)
    with pytest.raises(RefusedError, match="not allowed in this run, which takes fp16, int4"):
        decode(encoded, allowed=[parse("fp16"), parse("int4")])
    with pytest.raises(RefusedError, match="none at all"):
        decode(encoded, allowed=[])
    assert decode(encoded, allowed=[parse("fp16"), parse("int8")]).shape == (1000,)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("text", ["none", "fp16", "bf16", "int8", "int4", "drive", "topk:0.1"])
def test_values_and_scales_that_are_not_finite_are_refused(text: str, value: float) -> None:
    encoded = parse(text).encode(vector(), seed=1)
    part = "scales" if "scales" in encoded.parts else "values"
    wrong = encoded.parts[part].clone()
    wrong[-1] = value
    with pytest.raises(RefusedError):
        decode(changed(encoded, **{part: wrong}))


@pytest.mark.parametrize("text", ["int8", "int4", "drive"])
@pytest.mark.parametrize("value", [-1.0, -1e-30, 3e38])
def test_scales_that_no_encoder_writes_are_refused(text: str, value: float) -> None:
    encoded = parse(text).encode(vector(), seed=1)
    wrong = encoded.parts["scales"].clone()
    wrong[0] = value
    with pytest.raises(RefusedError, match="scale"):
        decode(changed(encoded, scales=wrong))


@pytest.mark.parametrize(("text", "part"), [("randk:0.1", "support_seed"), ("drive", "rotation_seed")])
def test_a_negative_seed_is_refused(text: str, part: str) -> None:
    encoded = parse(text).encode(vector(), seed=1)
    with pytest.raises(RefusedError, match="negative"):
        decode(changed(encoded, **{part: torch.tensor([-1])}))


def _set_all(bits: Tensor) -> Tensor:
    return torch.full_like(bits, 255)


def _clear_first(bits: Tensor) -> Tensor:
    cleared = bits.clone()
    cleared[int(bits.nonzero()[0])] = 0
    return cleared


@pytest.mark.parametrize(("text", "part"), [("topk:0.1", "index_high"), ("topk:0.5", "index_bitmap")])
@pytest.mark.parametrize("change", [_set_all, torch.zeros_like, _clear_first])
def test_too_many_or_too_few_indices_are_refused(text: str, part: str, change: Callable[[Tensor], Tensor]) -> None:
    encoded = parse(text).encode(vector(), seed=1)
    with pytest.raises(RefusedError, match="indices"):
        decode(changed(encoded, **{part: change(encoded.parts[part])}))


def test_indices_that_repeat_fall_or_leave_the_vector_are_refused() -> None:
    encoded = parse("topk:0.01").encode(torch.linspace(-1, 1, 1000), seed=1)  # 0-4 and 995-999: equal higher halves
    low = encoded.parts["index_low"]
    with pytest.raises(RefusedError, match="do not increase"):
        decode(changed(encoded, index_low=torch.zeros_like(low)))
    with pytest.raises(RefusedError, match="do not increase, or leave"):
        decode(changed(encoded, index_low=torch.full_like(low, 255)))


def test_bits_set_behind_the_last_index_are_refused() -> None:
    encoded = parse("topk:0.5").encode(torch.arange(1.0, 14), seed=1)  # a bitmap of 13 bits in two bytes
    high = encoded.parts["index_bitmap"].clone()
    high[-1] ^= 0b00001001  # the last index moves from 12 to 15
    with pytest.raises(RefusedError, match="outside"):
        decode(changed(encoded, index_bitmap=high))


# zstd


def frame(data: bytes, write_content_size: bool = True) -> Tensor:
    return torch.frombuffer(
        bytearray(zstandard.ZstdCompressor(write_content_size=write_content_size).compress(data)), dtype=torch.uint8
    )


def test_a_bomb_is_refused_before_it_is_decompressed() -> None:
    honest = parse("int8+zstd").encode(torch.zeros(1000), seed=1)
    bomb = frame(bytes(1 << 30))
    assert bomb.numel() < 100_000
    tracemalloc.start()
    with pytest.raises(RefusedError, match="another length"):
        decode(changed(honest, **{"codes.zst": bomb}), size=1000)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_bomb_that_hides_its_size_is_refused() -> None:
    honest = parse("int8+zstd").encode(torch.zeros(1000), seed=1)
    with pytest.raises(RefusedError, match="another length"):
        decode(changed(honest, **{"codes.zst": frame(bytes(1 << 24), write_content_size=False)}))


def test_a_frame_that_lies_about_its_size_is_refused() -> None:
    honest = parse("int8+zstd").encode(torch.zeros(1000), seed=1)
    lying = frame(bytes(1 << 20)).clone()
    content = int(zstandard.get_frame_parameters(lying.numpy().data).content_size)
    at = lying.numpy().tobytes().index(content.to_bytes(4, "little"))
    lying[at : at + 4] = torch.tensor(list((1000).to_bytes(4, "little")), dtype=torch.uint8)
    assert zstandard.get_frame_parameters(lying.numpy().data).content_size == 1000
    with pytest.raises(RefusedError):
        decode(changed(honest, **{"codes.zst": lying}))


@pytest.mark.parametrize("text", ["zstd", "int8+zstd", "topk:0.1+fp16+zstd"])
def test_a_truncated_frame_or_one_with_something_behind_it_is_refused(text: str) -> None:
    encoded = parse(text).encode(vector().round(decimals=1), seed=1)
    compressed = [name for name in encoded.parts if name.endswith(".zst")]
    assert compressed
    for name in compressed:
        part = encoded.parts[name]
        for wrong in (
            part[: len(part) // 2],
            part[:-1],
            part[:4],
            torch.cat([part, part]),
            torch.cat([part, part[:1]]),
        ):
            with pytest.raises(RefusedError):
                decode(changed(encoded, **{name: wrong}))


def test_a_part_that_is_there_both_compressed_and_not_is_refused() -> None:
    encoded = parse("int8+zstd").encode(torch.zeros(1000), seed=1)
    assert "codes.zst" in encoded.parts
    with pytest.raises(RefusedError, match="twice"):
        decode(changed(encoded, codes=torch.zeros(1000, dtype=torch.int8)))


def test_a_huge_claim_with_few_bytes_allocates_nothing() -> None:
    for text in ("none", "int8", "drive", "topk:0.001", "int4+zstd"):
        encoded = dataclasses.replace(parse(text).encode(vector(), seed=1), size=2**31 - 1)
        tracemalloc.start()
        with pytest.raises(RefusedError):
            decode(encoded)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
