"""The text of a chain, as on the command line: ``[sparsifier+][quantizer+][zstd]``, at least one, or ``none``.

A stage is written ``NAME:VALUE:VALUE``, with the values of its settings in the order of their declaration.
"""

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import Parameter

from fedshelf.compression.floats import Float
from fedshelf.compression.registry import KINDS
from fedshelf.compression.stage import Codec, Lossless, Quantizer, Sparsifier
from fedshelf.core.errors import UsageError
from fedshelf.core.settings import Setting, load, settings_of
from fedshelf.core.text import nearest

MAX_LENGTH = 200
_BOUNDS: Mapping[str, tuple[Callable[[float, float], bool], str]] = {
    "ge": (operator.ge, "at least"), "gt": (operator.gt, "above"), "le": (operator.le, "at most"),
    "lt": (operator.lt, "below"),
}  # fmt: skip


def parse_stages(text: str) -> tuple[Sparsifier | None, Quantizer, Lossless | None]:
    """Parse the stages of `text`; float32 if it names no quantizer.

    Raises:
        UsageError: lists all problems of the text.
    """
    if text == "none":
        return None, Float(), None
    if len(text) > MAX_LENGTH:
        raise UsageError(f"a codec of {len(text):,} characters is too long: the limit is {MAX_LENGTH}")
    problems: list[str] = []
    found: dict[str, Codec] = {}
    order, last = list(KINDS), ""
    for part in text.split("+"):
        name, *arguments = part.strip().split(":")
        kind = next((kind for kind, registry in KINDS.items() if name in registry), None)
        if kind is None:
            problems.append(_unknown(name))
            continue
        if kind == last:
            problems.append(f"{part.strip()!r}: a chain has at most one {_all_of(kind)}")
        elif last and order.index(kind) < order.index(last):
            problems.append(f"{part.strip()!r}: the {_all_of(kind)} comes before the {_all_of(last)}")
        last = max(kind, last or kind, key=order.index)
        try:
            found[kind] = _made(name, load(KINDS[kind][name]), arguments)
        except ValueError as error:
            problems.append(f"{part.strip()!r}: {error}")
    if problems:
        raise UsageError(*problems)
    sparsifier, quantizer, lossless = (found.get(kind) for kind in KINDS)
    if sparsifier is not None and getattr(quantizer, "unbiased", False):
        quantizer = replace(quantizer, unbiased=False)  # type: ignore[type-var]  # a dataclass with that field
    return sparsifier, quantizer or Float(), lossless  # type: ignore[return-value]  # by their kinds


def forms() -> dict[str, str]:
    """The syntax of each codec, such as ``zstd[:LEVEL]``."""
    components = {name: load(line) for registry in KINDS.values() for name, line in registry.items()}
    return {name: _form(name, settings_of(component)) for name, component in components.items()}


def _form(name: str, settings: Mapping[str, Setting]) -> str:
    parts = [f":{s.key}" if s.default is Parameter.empty else f"[:{s.key}]" for s in settings.values()]
    return "".join([name, *parts])


def _made(name: str, component: Callable[..., Codec], arguments: list[str]) -> Codec:
    """Create the stage `name` with these settings.

    Raises:
        ValueError: too few or too many values, or one out of range.
    """
    settings = settings_of(component)
    num_required = sum(setting.default is Parameter.empty for setting in settings.values())
    if not num_required <= len(arguments) <= len(settings):
        meanings = "; ".join(f"{setting.key}: {setting.help}" for setting in settings.values())
        raise ValueError(
            f"write {_form(name, settings)} ({meanings})" if settings else f"{name} takes nothing after it"
        )
    given = zip(settings.items(), arguments, strict=False)
    return component(**{parameter: _value(text, setting) for (parameter, setting), text in given})


def _value(text: str, setting: Setting) -> float:
    try:
        value: float = setting.type(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a {'whole ' if setting.type is int else ''}number") from None
    outside = [bound for name, bound in setting.bounds.items() if not _BOUNDS[name][0](value, bound)]
    if outside or not math.isfinite(value):
        bounds = [f"{_BOUNDS[name][1]} {bound:.3g}" for name, bound in setting.bounds.items()]
        raise ValueError(f"{setting.key} = {text} is not {' and '.join(bounds) or 'finite'}")
    return value


def _unknown(name: str) -> str:
    if name == "none":
        return "'none' cannot be part of a chain: leave it out"
    known = forms()
    near = nearest(name, known)
    return f"unknown codec {name!r}: " + (
        f"did you mean {known[near]!r}?" if near else f"the codecs are {', '.join(known)}"
    )


def _all_of(kind: str) -> str:
    return f"{kind} ({', '.join(KINDS[kind])})"
