"""The configuration as TOML: strict reading, writing, and its digest."""

import hashlib
import json
import logging
import re
import tomllib
from collections.abc import Container, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tomli_w
from pydantic import ValidationError

from fedshelf.config.schema import (
    DISTILL,
    NEWER,
    RENAMED,
    SIMULATE,
    ClientConfig,
    RunConfig,
    Settings,
    implied,
    recommended,
    select,
)
from fedshelf.config.without_effect import of_unused_components, without_effect
from fedshelf.core.errors import RefusedError, UsageError
from fedshelf.core.settings import Scope
from fedshelf.core.text import did_you_mean

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=Settings)
MAX_CHARACTERS = 1 << 16
"""Maximum length of a configuration from a server; real ones have about 2,000."""
_NEW_KEYS = {old.replace("_", "-"): new.replace("_", "-") for old, new in RENAMED.items()}


def load(kind: type[S], path: Path | None, overrides: Mapping[str, Any]) -> S:
    """Load settings from a file and apply overrides.

    Args:
        kind: the settings class.
        path: a TOML file, or None.
        overrides: values of flags, by field name.

    Returns:
        The settings.

    Raises:
        UsageError: lists all problems: an unreadable file, unknown keys (with the closest valid one), invalid values.
    """
    given = {name.replace("_", "-"): value for name, value in overrides.items()}
    values, given = _renamed({} if path is None else _read(path)), _renamed(given)
    config = _parsed(kind, {**values, **given}, where=str(path), flags=given)
    flags = {name for name in kind.model_fields if name.replace("_", "-") in given}
    keys = _explicit(config, values) - flags
    if problems := _contradictions(config) + of_unused_components(config, flags, keys):
        raise UsageError(*problems)
    for sentence in without_effect(config, flags, keys):
        logger.warning(sentence)
    return config


def _explicit(config: Settings, values: Container[str]) -> set[str]:
    """The fields that a file sets to other values than the usual ones: a run's own text holds all defaults."""
    usual = {name: field.default for name, field in type(config).model_fields.items()} | recommended(config.__dict__)
    return {name for name in usual if name.replace("_", "-") in values and getattr(config, name) != usual[name]}


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a byte order mark
    except OSError as error:
        raise UsageError(f"cannot read --config {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"cannot read --config {path}: it is not UTF-8 text. Save it as UTF-8") from None
    except (ValueError, RecursionError) as error:  # ValueError: not TOML, or an integer of thousands of digits
        raise UsageError(
            f"cannot read --config {path}: it is not valid TOML: {error}. Keys look like client-lr = 0.05, text needs "
            'quotes: model = "resnet18"'
        ) from None


def parse(kind: type[S], values: Mapping[str, Any], *, where: str, flags: Container[str] = ()) -> S:
    """Validate values.

    Values of TOML have types, which must be right (a whole number is also a number). Those of flags are texts.

    Args:
        kind: the settings class.
        values: values by key, with dashes.
        where: their source, for error messages.
        flags: the keys that come from the command line instead.

    Returns:
        The settings.

    Raises:
        UsageError: see `load`.
    """
    config = _parsed(kind, values, where=where, flags=flags)
    if problems := _contradictions(config):
        raise UsageError(*problems)
    return config


def _parsed(kind: type[S], values: Mapping[str, Any], *, where: str, flags: Container[str]) -> S:
    """Validate each value by itself."""
    values = _renamed(values)
    known = [field.alias or name for name, field in kind.model_fields.items()]
    problems = [
        f"[{key}] in {where}: sections are not used. Write its keys above any section, or without one"
        if isinstance(value, dict)
        else f"unknown key {key!r} in {where}{did_you_mean(_NEW_KEYS.get(key, key).replace('_', '-'), known)}"
        for key, value in values.items()
        if key not in known or isinstance(value, dict)
    ]
    usable = {key: value for key, value in values.items() if key in known and not isinstance(value, dict)}
    said = {key: usable.pop(key) for key in list(usable) if key in flags}
    read: list[S] = []
    for validate in (
        lambda: kind.model_validate_json(json.dumps(usable, default=lambda date: []), strict=True),
        lambda: kind.model_validate(said),
    ):
        try:
            read.append(validate())
        except ValidationError as error:
            for detail in error.errors():
                key = str(detail["loc"][0])
                written = f"--{key} {values[key]}" if key in said else f"{_as_toml(key, values[key])} in {where}"
                problems.append(f"{written}: {_what_is_wrong(detail)}")
    if not problems:
        return _merged(*read)
    raise UsageError(*problems)


def _merged(config: S, flagged: S) -> S:
    """The settings of a file with those of flags, and what they imply together."""
    given = {name: getattr(source, name) for source in (config, flagged) for name in source.model_fields_set}
    if not isinstance(config, RunConfig):
        return config.model_copy(update=given)
    unset = [name for name in (*NEWER, *recommended(config.__dict__)) if name not in given]  # not as the file implied
    kept = {name: RunConfig.model_fields[name].default for name in unset}
    return config.model_copy(update={**kept, **given, **implied(given)})


_WRONG: dict[str, str] = {
    "int_parsing": "not a whole number", "int_type": "not a whole number", "int_from_float": "not a whole number",
    "float_parsing": "not a number", "float_type": "not a number", "bool_parsing": "not true or false",
    "bool_type": "not true or false", "string_type": "not a text in quotes",
    "greater_than": "must be more than {gt}", "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}", "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number", "int_parsing_size": "is too large",
    "path_type": "not a path",
    "tuple_type": "not a list of texts in quotes, such as [\"a\", \"b\"]",
}  # fmt: skip
"""Messages by pydantic's error type."""


def _what_is_wrong(detail: "ErrorDetails") -> str:
    context = detail.get("ctx", {})
    if detail["type"] == "literal_error":
        choices = re.findall("'([^']*)'", context["expected"])
        return f"must be one of {', '.join(choices)}{did_you_mean(str(detail['input']), choices)}"
    if detail["type"] in _WRONG:
        bounds = {name: f"{bound:,}" if isinstance(bound, int) else f"{bound:,.10g}" for name, bound in context.items()}
        return _WRONG[detail["type"]].format(**bounds)
    return detail["msg"].removeprefix("Value error, ")


def _as_toml(key: str, value: Any) -> str:
    line = to_toml({key: value}).strip()
    return f"{key} = …" if "\n" in line else line


def to_toml(values: Mapping[str, Any]) -> str:
    """Format values by key as TOML."""
    return tomli_w.dumps(dict(values))


def effective(config: RunConfig) -> str:
    """Return everything that determines a run's result as TOML, as saved in the run directory."""
    values = select(config, Scope.RUN, Scope.SERVER)
    if config.slowdowns is not None:  # in virtual time, deadlines are reproducible and affect the result
        values["round-timeout"] = config.round_timeout
    return to_toml(_without_new(values))


def for_clients(config: RunConfig) -> str:
    """Return the part of the configuration that is sent to clients as TOML: no paths, no addresses."""
    return to_toml(_without_new(select(config, Scope.RUN)))


def _without_new(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out newer keys at their defaults: runs that began before these keys have the same text, and resume.

    Not those that the rest of the text implies another value for.
    """
    defaults = {name.replace("_", "-"): RunConfig.model_fields[name].default for name in NEWER}
    others = {key: value for key, value in values.items() if key not in defaults or value != defaults[key]}
    dependent = {name.replace("_", "-") for name in recommended({k.replace("-", "_"): v for k, v in others.items()})}
    return {key: value for key, value in values.items() if key in others or key in dependent}


def from_a_server(text: str) -> RunConfig:
    """Parse the output of `for_clients` as a client receives it.

    Args:
        text: from any source, untrusted.

    Returns:
        The configuration.

    Raises:
        RefusedError: it is too long, not TOML, or sets a key that is not the clients' business (such as a path).
        UsageError: lists unknown keys and invalid values.
    """
    if len(text) > MAX_CHARACTERS:
        raise RefusedError(f"the server's configuration has {len(text):,} characters; {MAX_CHARACTERS:,} is the most")
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the server's configuration is not TOML: {error}") from None
    others = {name.replace("_", "-") for name, flag in RunConfig.flags().items() if flag.scope is not Scope.RUN}
    if sent := sorted(others.intersection(name.replace("_", "-") for name in _renamed(values))):
        raise RefusedError(f"the server's configuration sets {', '.join(sent)}, which a server may not set for clients")
    return parse(RunConfig, values, where="the server's configuration")


def of_a_server(config: RunConfig) -> RunConfig:
    """Return `config` without simulation settings, so that one file can serve both commands.

    Raises:
        UsageError: it configures simulated attackers, or a certificate for a server without TLS.
    """
    problems = []
    if config.attack != "none":
        problems.append(
            f"attack = {config.attack!r}: only a simulation has attackers, the stores of a server are real. Remove "
            "attack, attackers and attack-factor from the file, or use it with 'fedshelf simulate'"
        )
    if config.insecure and (config.tls_cert or config.tls_key):
        problems.append(
            "--insecure with --tls-cert or --tls-key: a server without TLS has no certificate. Leave --insecure out, "
            "or the other two"
        )
    if problems:
        raise UsageError(*problems)
    if config.quorum is not None and config.quorum > config.min_clients:
        logger.warning(
            "--quorum %d has no effect while fewer stores take part: the run starts with --min-clients %d, and no "
            "round needs more uploads than stores are drawn for it. Set --min-clients %d to wait for so many",
            config.quorum, config.min_clients, config.quorum,
        )  # fmt: skip
    fields = RunConfig.model_fields
    simulated = [name for name, flag in RunConfig.flags().items() if flag.commands in (SIMULATE, DISTILL)]
    return config.model_copy(update={name: fields[name].default for name in simulated})


def with_new_names(toml: str) -> str:
    """Replace former names of keys in a configuration's text by the current ones."""
    for old, new in _NEW_KEYS.items():
        toml = re.sub(rf"^{old} = ", f"{new} = ", toml, flags=re.MULTILINE)
    return toml


def digest(toml: str) -> str:
    """Return the SHA-256 of a configuration's text."""
    return hashlib.sha256(toml.encode()).hexdigest()


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace former names of keys; a former name stays if the current one is also present."""
    renamed = dict(values)
    for old, new in _NEW_KEYS.items():
        if old in renamed and new not in renamed:
            renamed[new] = renamed.pop(old)
            _warn_of_former_name(old, new)
    return renamed


@cache
def _warn_of_former_name(old: str, new: str) -> None:
    """Log a former name once per process."""
    logger.warning("%s is now called %s: use the new name, the old one will go", old, new)


def _contradictions(config: Settings) -> list[str]:
    problems = []
    if isinstance(config, ClientConfig) and config.insecure and config.ca is not None:
        problems.append("--insecure with --ca: without TLS no certificate is checked. Leave one of the two out")
    if not isinstance(config, RunConfig):
        return problems
    if config.train == "head" and config.head_lr_factor == 0 and config.algorithm != "ridge" and not config.sales:
        problems.append("--head-lr-factor 0 with --train head: nothing would be trained. Leave one of the two out")
    if config.pretrained and config.init is not None:
        problems.append("--init and --pretrained exclude each other: choose one source of initial weights")
    if config.best_metric == "central_accuracy" and config.test_dir is None:
        problems.append("--best-metric central_accuracy needs test photos: add --test-dir DIR")
    if config.best_metric == "accuracy" and config.val_fraction == 0:
        problems.append("--best-metric accuracy needs validation photos: set --val-fraction above 0")
    if (config.attack == "none") != (config.attackers == 0):
        problems.append("--attack and --attackers go together: what is done, and how many stores do it")
    if config.attack_factor is not None and config.attack not in ("sign-flip", "scale"):
        problems.append("--attack-factor is for --attack sign-flip and scale only")
    return problems
