"""The text of a chain: what is understood, what is refused, and how it says so."""

import pytest

from fedshelf.compression.chain import parse
from fedshelf.core.errors import UsageError


@pytest.mark.parametrize(
    "text",
    [
        "none", "zstd", "zstd:9", "fp16", "bf16+zstd", "int8", "int4+zstd:19", "drive", "modular:16:0.1",
        "modular:16", "modular:16:0:1000", "modular:32:2.5:1000", "topk:0.01", "topk:0.01+int8+zstd",
        "randk:0.05+modular:16:1.0", "topk:1e-05+drive", "randk:1.0",
    ],
)  # fmt: skip
def test_a_canonical_text_is_kept(text: str) -> None:
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("zstd:3", "zstd"), ("topk:.01", "topk:0.01"), ("topk:1", "topk:1.0"), (" int8 + zstd ", "int8+zstd"),
        ("modular:16:1:64", "modular:16:1.0"), ("modular:32:0", "modular:32"), ("topk:1e-2", "topk:0.01"),
    ],
)  # fmt: skip
def test_other_ways_to_write_a_chain_have_the_same_canonical_text(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical
    assert parse(text) == parse(canonical)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("int9", "did you mean 'int8'"),
        ("tokp:0.1", "did you mean 'topk:F'"),
        ("gzip", "unknown codec 'gzip': the codecs are topk,"),
        ("", "unknown codec ''"),
        ("int8+", "unknown codec ''"),
        ("none+zstd", "'none' cannot be part of a chain"),
        ("topk", "write topk:F (F: the share of values that travel"),
        ("topk:0", "not above 0"),
        ("topk:1.5", "at most 1"),
        ("topk:nan", "F = nan is not above 0 and at most 1"),
        ("topk:x", "not a number"),
        ("topk:0.1:2", "write topk:F"),
        ("topk:0.1+randk:0.1", "at most one"),
        ("int8+int4", "at most one"),
        ("zstd+zstd", "at most one"),
        ("int8+topk:0.1", "comes before the"),
        ("zstd+int8", "comes before the"),
        ("int8:4", "takes nothing after it"),
        ("zstd:0", "LEVEL = 0 is not at least 1 and at most 19"),
        ("zstd:20", "at most 19"),
        ("zstd:x", "not a whole number"),
        ("zstd:3:3", "LEVEL: 1 (fast"),
        ("modular", "write modular:BITS"),
        ("modular:12:1.0", "choose 8, 16 or 32"),
        ("modular:16:1e-40", "RANGE = 1e-40 is not at least 7.89e-31, nor 0"),
        ("modular:16:-1", "RANGE = -1 is not at least"),
        ("modular:16:inf", "RANGE = inf is not at least"),
        ("modular:8:1.0:128", "no room for 128 summands"),
        ("modular:8:1.0:0", "SUMMANDS = 0 is not at least 1"),
        ("zstd:" + "9" * 500, "too long"),
    ],
)
def test_a_wrong_text_is_refused_with_its_reason(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told.replace("'", "['\"]").replace("(", r"\(")):
        parse(text)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        parse("zstd:77+int5+topk:7")
    assert len(caught.value.args) == 4  # the level, the name, the order, the fraction
    for told in ("LEVEL = 77", "did you mean 'int", "comes before the", "at most 1"):
        assert told in str(caught.value)


def test_the_pipeline_can_read_off_what_each_chain_promises() -> None:
    def promised(text: str) -> set[str]:
        properties = parse(text).properties
        return {name for name in properties.__dataclass_fields__ if getattr(properties, name) is True}

    assert promised("none") == {"lossless", "unbiased", "linear"}
    assert promised("zstd") == {"lossless", "unbiased"}
    assert promised("fp16") == promised("bf16") == set()
    assert promised("int8") == promised("int4+zstd") == promised("drive") == {"unbiased"}
    assert promised("modular:16:1.0") == {"unbiased", "linear", "modular", "bounded"}
    assert promised("modular:16:1.0+zstd") == {"unbiased", "bounded"}  # frames cannot be added
    assert (
        promised("topk:0.1") == promised("topk:0.1+int8+zstd") == promised("topk:0.1+drive") == {"needs_error_feedback"}
    )
    assert promised("topk:0.1+modular:16:1.0") == {"needs_error_feedback", "bounded"}
    assert promised("randk:0.1") == {"needs_error_feedback", "linear", "common_seed"}
    assert promised("randk:0.1+modular:16:1.0") == {
        "needs_error_feedback", "linear", "common_seed", "modular", "bounded",
    }  # fmt: skip
    assert parse("topk:0.1+int8").properties.kept_fraction == 0.1
    assert parse("randk:0.1+modular:16:1.0:40").properties.summands == 40
