"""The text of a chain, as on the command line: ``[sparsifier+][quantizer+][zstd]``, at least one, or ``none``."""

import math
from collections.abc import Callable
from dataclasses import replace

from fedshelf.compression.block import BlockInt
from fedshelf.compression.drive import Drive
from fedshelf.compression.floats import Float
from fedshelf.compression.lossless import LEVELS, Zstd
from fedshelf.compression.modular import TYPES, Modular
from fedshelf.compression.randk import RandK
from fedshelf.compression.stage import MAX_MAGNITUDE, Lossless, Quantizer, Sparsifier
from fedshelf.compression.topk import TopK
from fedshelf.core.errors import UsageError
from fedshelf.core.suggestions import nearest
from fedshelf.core.text import counted

Stage = Sparsifier | Quantizer | Lossless
FORMS = {
    "topk": "topk:F", "randk": "randk:F", "fp16": "fp16", "bf16": "bf16", "int8": "int8", "int4": "int4",
    "drive": "drive", "modular": "modular:BITS:RANGE[:SUMMANDS]", "zstd": "zstd[:LEVEL]",
}  # fmt: skip
_KINDS = {"topk": 0, "randk": 0, "zstd": 2}  # all others are quantizers, 1
_KIND_NAMES = ("sparsifier (topk, randk)", "quantizer (fp16, bf16, int8, int4, drive, modular)", "zstd")
MAX_LENGTH = 200


class _Wrong(ValueError):
    """One stage's problem, for the list of all."""


def parse_stages(text: str) -> tuple[Sparsifier | None, Quantizer, Lossless | None]:
    """The stages that `text` names; float32 where it names no quantizer.

    Raises:
        UsageError: listing everything that is wrong with the text.
    """
    if text == "none":
        return None, Float(), None
    if len(text) > MAX_LENGTH:
        raise UsageError(f"a codec of {len(text):,} characters is too long: the limit is {MAX_LENGTH}")
    problems: list[str] = []
    found: dict[int, Stage] = {}
    highest = -1
    for part in text.split("+"):
        name, *arguments = part.strip().split(":")
        if name not in FORMS:
            problems.append(_unknown(name))
            continue
        kind = _KINDS.get(name, 1)
        if kind == highest:
            problems.append(f"{part.strip()!r}: a chain has at most one {_KIND_NAMES[kind]}")
        elif kind < highest:
            problems.append(f"{part.strip()!r}: the {_KIND_NAMES[kind]} comes before the {_KIND_NAMES[highest]}")
        highest = max(kind, highest)
        try:
            found[kind] = _STAGES[name](arguments)
        except _Wrong as wrong:
            problems.append(f"{part.strip()!r}: {wrong}")
    if problems:
        raise UsageError(*problems)
    return _assemble(found)


def _assemble(found: dict[int, Stage]) -> tuple[Sparsifier | None, Quantizer, Lossless | None]:
    sparsifier, quantizer, lossless = (found.get(kind) for kind in range(3))
    if sparsifier is not None and isinstance(quantizer, BlockInt | Drive):
        quantizer = replace(quantizer, unbiased=False)  # error feedback wants a contraction
    return sparsifier, quantizer or Float(), lossless  # type: ignore[return-value]  # by their kinds


def _unknown(name: str) -> str:
    if name == "none":
        return "'none' cannot be part of a chain: leave it out"
    near = nearest(name, FORMS)
    return f"unknown codec {name!r}: " + (
        f"did you mean {FORMS[near]!r}?" if near else f"the codecs are {', '.join(FORMS)}"
    )


def _fraction(arguments: list[str], name: str) -> float:
    if len(arguments) != 1:
        raise _Wrong(f"write {name}:F, F the fraction of values to send, such as {name}:0.01")
    fraction = _number(arguments[0])
    if not 0 < fraction <= 1:
        raise _Wrong(f"the fraction {arguments[0]} is not above 0 and at most 1")
    return fraction


def _modular(arguments: list[str]) -> Modular:
    if len(arguments) not in (2, 3):
        raise _Wrong("write modular:BITS:RANGE or modular:BITS:RANGE:SUMMANDS, such as modular:16:0.1")
    bits, reach = _whole(arguments[0]), _number(arguments[1])
    if bits not in TYPES:
        raise _Wrong(f"there are no integers of {bits} bits: choose 8, 16 or 32")
    if not 1 / MAX_MAGNITUDE <= reach <= MAX_MAGNITUDE:
        raise _Wrong(f"the range {arguments[1]} is not between {1 / MAX_MAGNITUDE:.3g} and {MAX_MAGNITUDE:.3g}")
    stage = Modular(bits, reach) if len(arguments) == 2 else Modular(bits, reach, _whole(arguments[2]))
    if stage.summands < 1 or stage.levels < 1:
        raise _Wrong(
            f"{bits} bits have no room for {counted(stage.summands, 'summand')}: choose from 1 to {2 ** (bits - 1) - 1}"
        )
    return stage


def _zstd(arguments: list[str]) -> Zstd:
    if not arguments:
        return Zstd()
    level = _whole(arguments[0])
    if len(arguments) > 1 or level not in LEVELS:
        raise _Wrong(f"write zstd or zstd:LEVEL, LEVEL from {LEVELS[0]} to {LEVELS[-1]}")
    return Zstd(level)


def _plain(name: str, stage: Stage) -> Callable[[list[str]], Stage]:
    def make(arguments: list[str]) -> Stage:
        if arguments:
            raise _Wrong(f"{name} takes nothing after it")
        return stage

    return make


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise _Wrong(f"{text!r} is not a number") from None
    if not math.isfinite(number):
        raise _Wrong(f"{text!r} is not finite")
    return number


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise _Wrong(f"{text!r} is not a whole number")
    return int(text)


_STAGES: dict[str, Callable[[list[str]], Stage]] = {
    "topk": lambda arguments: TopK(_fraction(arguments, "topk")),
    "randk": lambda arguments: RandK(_fraction(arguments, "randk")),
    "fp16": _plain("fp16", Float("fp16")),
    "bf16": _plain("bf16", Float("bf16")),
    "int8": _plain("int8", BlockInt(8)),
    "int4": _plain("int4", BlockInt(4)),
    "drive": _plain("drive", Drive()),
    "modular": _modular,
    "zstd": _zstd,
}
