"""The components that a run chooses from, and their settings as fields of its configuration.

A run names one component of each family, for example `--algorithm fedprox`. Optional components, such as the stages of
the upload pipeline, are used if their first setting is set: `--clip-norm 1`. The settings of all components are keys of
every run; to set one of a component that is not used is an error (`config.without_effect`).
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from inspect import Parameter
from operator import or_
from typing import Any

from fedshelf.algorithms.registry import AGGREGATORS, ALGORITHMS
from fedshelf.core.settings import Setting, load, settings_of
from fedshelf.personalization.registry import PERSONALIZATIONS
from fedshelf.privacy.registry import PROTECTIONS, STAGES
from fedshelf.tracking.registry import SINKS
from fedshelf.training.losses import LOSSES

FAMILIES: Mapping[str, Mapping[str, str]] = {
    "algorithm": ALGORITHMS, "loss": LOSSES, "aggregator": AGGREGATORS, "personalize": PERSONALIZATIONS,
    "dp": PROTECTIONS,
}  # fmt: skip
"""By the key that chooses the component: the registry to choose from."""

OPTIONAL: Mapping[str, Mapping[str, str]] = {"dp": STAGES, "run_dir": SINKS}
"""By the key that their settings follow: registries of optional components."""


def component_settings() -> dict[str, dict[str, Setting]]:
    """Return the settings that components declare, by the run's key that they follow and by their own."""
    users: dict[str, dict[str, dict[str, Setting]]] = {}
    for before, registry in FAMILIES.items():
        for name, line in registry.items():
            for setting in settings_of(load(line)).values():
                users.setdefault(before, {}).setdefault(setting.key, {})[name] = setting
    for before, registry in OPTIONAL.items():
        for line in registry.values():
            switch, *others = settings_of(load(line)).values()
            for setting in (switch, *others):
                name = f"--{switch.key.replace('_', '-')}"
                users.setdefault(before, {}).setdefault(setting.key, {})[name] = setting
    return {before: {key: _shared(found) for key, found in keys.items()} for before, keys in users.items()}


def _shared(users: Mapping[str, Setting]) -> Setting:
    """Merge components' settings of the same key; the help names the components.

    If their defaults differ, the merged one has none, and each component uses its own. A setting that an optional
    component requires is None until the run sets it.
    """
    names: dict[Any, list[str]] = {}
    for name, setting in users.items():
        names.setdefault(setting.default, []).append(name)
    kinds = reduce(or_, (each.type for each in users.values()))
    if Parameter.empty in names:
        return replace(setting, type=kinds | None, default=None)
    text = setting.help.rstrip(".")
    if len(names) == 1:
        return replace(setting, help=f"{text} ({', '.join(users)}).")
    defaults = "; ".join(f"{default} for {', '.join(having)}" for default, having in names.items())
    return replace(setting, help=f"{text} (default: {defaults}).", type=kinds | None, default=None)
