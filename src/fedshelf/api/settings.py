"""Keyword arguments as settings: the names of the flags, with the same validation and messages."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fedshelf.algorithms.base import Algorithm
from fedshelf.algorithms.registry import ALGORITHMS
from fedshelf.config import files
from fedshelf.config.schema import RENAMED, Settings
from fedshelf.core.errors import UsageError
from fedshelf.core.settings import load, settings_of
from fedshelf.core.text import did_you_mean, some

S = TypeVar("S", bound=Settings)


def config_of(
    kind: type[S], command: str, given: Mapping[str, Any], *, file: Path | str | None = None,
    algorithm: str | Algorithm | None = None,
) -> S:  # fmt: skip
    """Validate keyword arguments.

    Args:
        kind: the settings class.
        command: the command that has the same flags.
        given: values by name; None leaves the default.
        file: a TOML file with further settings; keyword arguments win.
        algorithm: an algorithm's name, or an instance.

    Returns:
        The settings.

    Raises:
        UsageError: lists all problems.
    """
    flags = kind.flags()
    names = [name for name in flags if command in flags[name].commands]
    names += [old for old, new in RENAMED.items() if new in names]
    if unknown := [name for name in given if name not in names]:
        raise UsageError(*(f"unknown keyword argument {name!r}{did_you_mean(name, names)}" for name in unknown))
    values = {name: value for name, value in given.items() if value is not None}
    if isinstance(algorithm, str):
        values["algorithm"] = algorithm
    elif algorithm is not None:
        own, defaults = settings_of_algorithm(algorithm)
        if twice := sorted((own.keys() | defaults.keys()) & values.keys()):
            raise UsageError(f"{some(twice)}: give it to {type(algorithm).__name__}, not as a keyword argument, too")
        values |= own if file is None else defaults | own
    return files.load(kind, None if file is None else Path(file), values)


def settings_of_algorithm(algorithm: Algorithm) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings that make an algorithm.

    Args:
        algorithm: an instance of a registered component.

    Returns:
        Its name and the settings that differ from its defaults; and those that do not, which a run records only if they
        are set.

    Raises:
        UsageError: no registered algorithm makes such an instance.
    """
    for name, line in ALGORITHMS.items():
        component = load(line)
        made = component.func if isinstance(component, partial) else component
        if not isinstance(made, type) or type(algorithm) is not made:
            continue
        settings = settings_of(component)
        own = {parameter: getattr(algorithm, parameter) for parameter in settings}
        if component(**own) == algorithm:
            changed = {settings[p].key: v for p, v in own.items() if v != settings[p].default}
            defaults = {settings[p].key: v for p, v in own.items() if v == settings[p].default}
            return {"algorithm": name, **changed}, {key: v for key, v in defaults.items() if v is not None}
    raise UsageError(
        f"algorithm {algorithm!r} is not a registered one: clients could not build it from a run's "
        "settings. Use a class of fedshelf.algorithms, or register yours (docs/how-to/add-an-algorithm.md)"
    )
