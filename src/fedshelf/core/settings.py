"""Declarations of what can be set in a run, its algorithm, its codecs and its other components.

A component is what a registry's line names (`MODULE:NAME`): a dataclass, a function, or a `partial` of one. Its
settings are the parameters annotated with a `Setting`:

    @dataclass(frozen=True, slots=True)
    class FedProx:
        mu: Annotated[float, Setting(help="Strength of the proximal term.", ge=0)] = 0.01

Every setting has a default, except for the required ones of a codec, and the first one of an optional component (a
stage or a sink), which is used only if a run sets it.

A component whose values may contradict each other has a method `problems() -> list[str]` that returns each problem with
its remedy.

Flags, keys of TOML files, the reference and validation are derived from these declarations (`config.schema`). For that,
the command line imports all components at startup. They therefore import torch and numpy only for type checkers, or
inside functions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache, partial
from importlib import import_module
from inspect import signature
from typing import Any, get_args, get_type_hints

MAX_INTEGER = 1_000_000
"""Upper bound of a whole number that declares none."""

MAX_SEED, MAX_SECONDS = 2**63 - 1, 1_000_000_000

DATA, MODEL, TRAINING, ALGORITHM, WIRE, ROUNDS, RUN = (
    "Data", "Model", "Local training", "Algorithm", "Wire", "Rounds", "Run",
)  # fmt: skip


class Scope(StrEnum):
    """Who needs a value.

    Attributes:
        RUN: affects the result, and is sent to clients.
        SERVER: affects the result, at the server only.
        LOCAL: may change when a run is resumed (with exceptions in virtual time: `config.files.effective`).
    """

    RUN = "run"
    SERVER = "server"
    LOCAL = "local"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A value that can be set.

    Attributes:
        help: what it does. The names of the components that declare it are appended.
        key: its name in files and, with dashes, as a flag; by default the parameter's name. Components that declare the
            same key share it.
        ge: inclusive lower bound.
        gt: exclusive lower bound.
        le: inclusive upper bound.
        lt: exclusive upper bound.
        panel: its heading in the help.
        scope: who needs it.
        commands: commands that have it as a flag.
        only_with: another field, and its values with which this setting has an effect; without values: any that is set.
        type: type of its values; filled in by `settings_of`.
        default: value if a run sets none; filled in by `settings_of`.
    """

    help: str
    key: str = ""
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    panel: str = ALGORITHM
    scope: Scope = Scope.RUN
    commands: tuple[str, ...] = ("simulate", "server")
    only_with: tuple[str, ...] = ()
    type: Any = None
    default: Any = None

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that are set, keyed by `ge`, `gt`, `le` and `lt`."""
        return {name: bound for name in ("ge", "gt", "le", "lt") if (bound := getattr(self, name)) is not None}

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Let pydantic enforce the bounds of the annotation, and `MAX_INTEGER`."""
        schema = handler(source)
        inner = schema.get("schema", schema)  # of `float | None`
        inner.update(({"le": MAX_INTEGER} if inner["type"] == "int" else {}) | self.bounds)
        return schema


@cache
def load(line: str) -> Callable[..., Any]:
    """The component that a registry's line names as `MODULE:NAME`; for an instance, a function that returns it."""
    module, _, name = line.partition(":")
    named = getattr(import_module(module), name)
    return named if callable(named) else lambda: named


@cache
def settings_of(component: Callable[..., Any]) -> dict[str, Setting]:
    """The settings of a component by parameter, with key, type and default, without those that a `partial` binds."""
    function, settled = (component.func, component.keywords) if isinstance(component, partial) else (component, {})
    hints = get_type_hints(function, include_extras=True)
    found = {}
    for name, parameter in signature(component).parameters.items():
        kind, *metadata = get_args(hints.get(name)) or (None,)
        setting = next((item for item in metadata if isinstance(item, Setting)), None)
        if setting is not None and name not in settled:
            found[name] = replace(setting, key=setting.key or name, type=kind, default=parameter.default)
    return found
