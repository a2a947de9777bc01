"""Finds settings that were given although they have no effect in combination with the others.

What a setting needs is declared beside it: a component's setting needs the component, `Setting.only_with` names other
settings, and an algorithm's `ignores` names those that it does not use.

A setting of a component that the run does not use is an error. Where others leave a setting without effect, for example
by too few rounds, it is a warning.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from fedshelf.algorithms.registry import ALGORITHMS
from fedshelf.config.families import FAMILIES, OPTIONAL
from fedshelf.config.schema import RunConfig, Settings
from fedshelf.core.settings import load, settings_of
from fedshelf.core.text import alternatives, counted
from fedshelf.models.registry import is_own


def of_unused_components(config: Settings, flags: Collection[str], keys: Collection[str] = ()) -> list[str]:
    """Describe the settings of components that the run does not use.

    A key of a file is not one of them if a flag has chosen the component: one file serves several algorithms.

    Args:
        config: the settings.
        flags: the fields that were given as flags.
        keys: the fields that were given in a file, neither with their defaults nor with what others imply.

    Returns:
        One sentence for each reason: the flags, why they have no effect, and what to do.
    """
    if not isinstance(config, RunConfig):
        return []
    found = _of_other_components(config, _turned_on(config, {*flags, *keys}))
    refused = {name: why for name, (chooser, why) in found.items() if name in flags or chooser not in flags}
    return _sentences(config, refused)


def without_effect(config: Settings, flags: Collection[str], keys: Collection[str] = ()) -> list[str]:
    """Describe the other settings that have no effect; see `of_unused_components`."""
    given = _turned_on(config, {*flags, *keys})
    found = dict(_without_another(config, given))
    if not isinstance(config, RunConfig):
        return _sentences(config, found)
    others = _of_other_components(config, given).items()
    found |= {name: why for name, (chooser, why) in others if name not in flags and chooser in flags}
    return _sentences(config, found | _ignored(config, given) | _unreached(config, given)) + _on_random_weights(config)


def without_effect_on(config: RunConfig, num_stores: int) -> list[str]:
    """Describe the settings that have no effect with so few stores; see `of_unused_components`."""
    from fedshelf.scheduling.cohort import size  # which loads torch: the command line does without

    if config.fraction == 1 or size(num_stores, fraction=config.fraction) < num_stores:
        return []
    return _sentences(config, {
        "fraction": f"with {counted(num_stores, 'store')}: all take part in each round. Use a smaller number, or add "
        "stores"
    })  # fmt: skip


def _turned_on(config: Settings, given: Collection[str]) -> set[str]:
    """The given fields but those that turn something off."""
    return {name for name in given if getattr(config, name) not in (None, False, "none")}


def _sentences(config: Settings, found: Mapping[str, str]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for name in type(config).flags():
        if name in found:
            reasons.setdefault(found[name], []).append(_flag(name))
    return [
        f"{_joined(flags)} {'has' if len(flags) == 1 else 'have'} no effect {reason}, or leave {_joined(flags)} out"
        for reason, flags in reasons.items()
    ]


def _without_another(config: Settings, given: Collection[str]) -> Iterator[tuple[str, str]]:
    """Find settings whose `only_with` does not hold."""
    for name, setting in type(config).flags().items():
        if name not in given or not setting.only_with:
            continue
        other, *values = setting.only_with
        value = getattr(config, other)
        if not values and not value:
            yield name, f"without {_flag(other)}. Add that"
        elif values and value not in values:
            yield name, f"with {_flag(other)} {value}. Use {_flag(other)} {alternatives(values)}"


def _of_other_components(config: RunConfig, given: Collection[str]) -> dict[str, tuple[str, str]]:
    """Find settings of components that the run does not use: the field that chooses those, and why."""
    used = {key for family in FAMILIES for key in _keys(FAMILIES[family][getattr(config, family)])}
    used |= {key for registry in OPTIONAL.values() for line in registry.values() for key in _keys(line)}
    if config.warm_start != "none" or config.refit_head:
        used |= _keys(ALGORITHMS["ridge"])
    found: dict[str, tuple[str, str]] = {}
    for family, registry in FAMILIES.items():
        chosen = getattr(config, family)
        for key in {key for line in registry.values() for key in _keys(line)} & {*given} - used:
            names = [name for name, line in registry.items() if key in _keys(line)]
            found[key] = family, f"with {_flag(family)} {chosen}. Use {_flag(family)} {alternatives(names)}"
    for registry in OPTIONAL.values():
        for line in registry.values():
            switch, *others = (setting.key for setting in settings_of(load(line)).values())
            if not getattr(config, switch):
                found |= {key: (switch, f"without {_flag(switch)}. Add that") for key in others if key in given}
    return found


def _ignored(config: RunConfig, given: Collection[str]) -> dict[str, str]:
    """Find settings that the algorithm does not use."""
    algorithm, personalization = (_component(config, family) for family in ("algorithm", "personalize"))
    ignored = {name for name in algorithm.ignores if name in given} - {*personalization.uses}
    found = dict.fromkeys(ignored, f"with --algorithm {config.algorithm}. Use another algorithm")
    if algorithm.sums and "rounds" in given and config.rounds > 1 and config.fraction == 1 and not config.dropout:
        found["rounds"] = (
            f"above 1 with --algorithm {config.algorithm}, unless stores join or photos change during the run: one "
            "round gives the final output layer. Use --rounds 1"
        )
    return found


def _unreached(config: RunConfig, given: Collection[str]) -> dict[str, str]:
    """Find settings whose number of rounds is not reached, or that need something that is not there."""
    rounds = config.rounds + config.extend
    found = {
        name: f"beyond the run's last round ({rounds}). Use a smaller number"
        for name in ("unfreeze_after", "average_rounds", "patience")
        if name in given and getattr(config, name) > rounds
    }
    if "model_path" in given and not is_own(config.model):
        found["model_path"] = f"with --model {config.model}. Use --model MODULE:FUNCTION"
    if "over_selection" in given and config.over_selection and config.fraction == 1:
        found["over_selection"] = "with --fraction 1: no further clients are left to draw. Use a smaller --fraction"
    if "unfreeze_after" in given and config.unfreeze_after and not config.head_lr_factor:
        found["unfreeze_after"] = (
            "but rounds without training: with --head-lr-factor 0, which --pretrained implies, the output layer stays "
            "as it is. Add --head-lr-factor 1"
        )
    return found


def _on_random_weights(config: RunConfig) -> list[str]:
    """Explain why an output layer in closed form is poor, if it is."""
    starts_fresh = not config.pretrained and config.init is None and not is_own(config.model)
    if not starts_fresh or not (_component(config, "algorithm").sums or config.warm_start != "none"):
        return []
    flag = f"--warm-start {config.warm_start}" if config.warm_start != "none" else f"--algorithm {config.algorithm}"
    return [
        f"{flag} on random weights: the output layer is computed from features that nothing has trained, so its "
        "accuracy is poor. Add --pretrained (with a timm model such as tf_efficientnet_lite0), or --init FILE"
    ]


def _component(config: RunConfig, family: str) -> Any:
    component: Callable[..., Any] = load(FAMILIES[family][getattr(config, family)])
    return config.settings_of(component)


def _keys(line: str) -> set[str]:
    """Keys of the settings that a registry's component declares."""
    settings: Mapping[str, Any] = settings_of(load(line))
    return {setting.key for setting in settings.values()}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _joined(flags: list[str]) -> str:
    *first, last = flags
    return f"{', '.join(first)} and {last}" if first else last
