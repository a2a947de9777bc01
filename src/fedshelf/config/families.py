"""The families of components that a run chooses from, and their settings as fields of its configuration.

A run names one component of each family, for example `--algorithm fedprox`. The settings of all components are keys of
every run; those of components that are not chosen are ignored.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedshelf.algorithms.registry import AGGREGATORS, ALGORITHMS
from fedshelf.core.settings import Setting, load, settings_of
from fedshelf.personalization.registry import PERSONALIZATIONS
from fedshelf.training.losses import LOSSES

FAMILIES: Mapping[str, Mapping[str, str]] = {
    "algorithm": ALGORITHMS, "loss": LOSSES, "aggregator": AGGREGATORS, "personalize": PERSONALIZATIONS,
}  # fmt: skip
"""By the key that chooses the component: the registry to choose from."""


def component_settings() -> dict[str, dict[str, Setting]]:
    """Return the settings that components declare, by family and key."""
    users: dict[str, dict[str, dict[str, Setting]]] = {}
    for family, registry in FAMILIES.items():
        for name, line in registry.items():
            for setting in settings_of(load(line)).values():
                users.setdefault(family, {}).setdefault(setting.key, {})[name] = setting
    return {family: {key: _shared(found) for key, found in keys.items()} for family, keys in users.items()}


def _shared(users: Mapping[str, Setting]) -> Setting:
    """Merge components' settings of the same key; the help names the components.

    If their defaults differ, the merged one has none, and each component uses its own.
    """
    names: dict[Any, list[str]] = {}
    for name, setting in users.items():
        names.setdefault(setting.default, []).append(name)
    text = setting.help.rstrip(".")
    if len(names) == 1:
        return replace(setting, help=f"{text} ({', '.join(users)}).")
    defaults = "; ".join(f"{default} for {', '.join(having)}" for default, having in names.items())
    return replace(setting, help=f"{text} (default: {defaults}).", type=setting.type | None, default=None)
