"""The configuration as TOML: reading with strict keys, writing, and its digest."""

import difflib
import hashlib
import logging
import re
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import ValidationError

from fedshelf.config.schema import RENAMED, RunConfig, Settings, select
from fedshelf.core.errors import UsageError
from fedshelf.core.settings import Scope

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=Settings)
_NEW_KEYS = {old.replace("_", "-"): new.replace("_", "-") for old, new in RENAMED.items()}


def load(kind: type[S], path: Path | None, overrides: Mapping[str, Any]) -> S:
    """The settings in `path` (if any), with `overrides` (field name to value) on top.

    Raises:
        UsageError: listing every problem: unreadable file, unknown keys (with the nearest right one), bad values.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"--config {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"--config {path} is not TOML: {error}") from None
    given = {name.replace("_", "-"): value for name, value in overrides.items()}
    return parse(kind, {**_renamed(values), **_renamed(given)}, where=str(path) if path else "the command line")


def parse(kind: type[S], values: Mapping[str, Any], *, where: str) -> S:
    """Check `values` (by key, with dashes).

    Raises:
        UsageError: see `load`.
    """
    values = _renamed(values)
    known = [field.alias or name for name, field in kind.model_fields.items()]
    problems = []
    for key in values:
        if key not in known:
            near = [_NEW_KEYS[key]] if key in _NEW_KEYS else difflib.get_close_matches(
                key.replace("_", "-"), known, n=1, cutoff=0.5
            )  # fmt: skip
            problems.append(f"{key!r} is no key" + (f"; did you mean {near[0]!r}?" if near else ""))
    try:
        config = kind.model_validate({key: value for key, value in values.items() if key in known})
    except ValidationError as error:
        for detail in error.errors():
            key = ".".join(map(str, detail["loc"]))
            problems.append(f"{key} = {detail['input']!r}: {detail['msg']}")
    else:
        problems += _contradictions(config) if isinstance(config, RunConfig) else []
        if not problems:
            return config
    raise UsageError(f"{where}: " + "; ".join(problems))


def to_toml(values: Mapping[str, Any]) -> str:
    """Values by key as TOML text."""
    return tomli_w.dumps(dict(values))


def effective(config: RunConfig) -> str:
    """All that decides a run's result, as TOML text: what a run directory keeps."""
    values = select(config, Scope.RUN, Scope.SERVER)
    if config.slowdowns is not None:  # who keeps a deadline in virtual time is no accident of the day
        values["round-timeout"] = config.round_timeout
    return to_toml(values)


def for_clients(config: RunConfig) -> str:
    """The part that clients are sent, as TOML text: no paths, no addresses."""
    return to_toml(select(config, Scope.RUN))


def of_a_server(config: RunConfig) -> RunConfig:
    """`config` without what only a simulation goes by: one file may serve both commands.

    Raises:
        UsageError: it tells of attackers, and at a server there are none but real ones.
    """
    if config.attack != "none":
        raise UsageError(
            f"attack = {config.attack!r}: attackers are simulated ones, and the stores of a server are real; take "
            "attack, attackers and attack-factor out of the file, or run fedshelf simulate with it"
        )
    fields = RunConfig.model_fields
    simulated = [name for name, flag in RunConfig.flags().items() if "server" not in flag.commands]
    return config.model_copy(update={name: fields[name].default for name in simulated})


def with_new_names(toml: str) -> str:
    """The text of a configuration, with the present names of keys that were called otherwise when it was written."""
    for old, new in _NEW_KEYS.items():
        toml = re.sub(rf"^{old} = ", f"{new} = ", toml, flags=re.MULTILINE)
    return toml


def digest(toml: str) -> str:
    """SHA-256 of a configuration's text."""
    return hashlib.sha256(toml.encode()).hexdigest()


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` under the present names of their keys; a former name that stands beside the present one stays."""
    renamed = dict(values)
    for old, new in _NEW_KEYS.items():
        if old in renamed and new not in renamed:
            renamed[new] = renamed.pop(old)
            _tell_new_name(old, new)
    return renamed


@cache
def _tell_new_name(old: str, new: str) -> None:
    """Say it once, however often a process meets the old name."""
    logger.warning("%s is now called %s: use the new name, the old one will go", old, new)


def _contradictions(config: RunConfig) -> list[str]:
    problems = []
    if config.pretrained and config.init is not None:
        problems.append("init and pretrained exclude each other: weights come from one of them")
    if config.best_metric == "central_accuracy" and config.test_dir is None:
        problems.append("best-metric central_accuracy needs a test-dir")
    if config.best_metric == "accuracy" and config.val_fraction == 0:
        problems.append("best-metric accuracy needs validation photos: val-fraction above 0")
    if (config.attack == "none") != (config.attackers == 0):
        problems.append("attack and attackers go together: what is done, and how many stores do it")
    if config.attack_factor is not None and config.attack not in ("sign-flip", "scale"):
        problems.append("attack-factor is for the attacks sign-flip and scale")
    return problems
