"""A store's policy: what this client does for a server, whatever the server asks for.

A policy is a TOML file with one table per class in `TABLES`. A key that is left out has the value of the built-in
policy `standard`. To add a table, add a frozen dataclass to `policy_tables`, a field of `Policy`, and a line to
`TABLES`.
"""

import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

from fedshelf.core.errors import PolicyError, UsageError
from fedshelf.core.messages import Broadcast, Purpose
from fedshelf.core.settings import Setting, settings_of
from fedshelf.core.system_errors import content_problem, reason
from fedshelf.core.text import counted, did_you_mean
from fedshelf.models.registry import is_own
from fedshelf.privacy.policy_tables import (
    Limits,
    Metrics,
    Models,
    Protection,
    ProtectionOffer,
    Purposes,
    Server,
)

UNLIMITED = 2**62
BUDGET = ("epsilon", "delta")  # keys of [protection] that only a required protection gives effect

TABLES = MappingProxyType(
    {"limits": Limits, "models": Models, "purposes": Purposes, "protection": Protection, "metrics": Metrics,
     "server": Server}
)  # fmt: skip
"""The tables of a policy file by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """A store's policy. The defaults are those of `standard`.

    Attributes:
        limits: limits on tasks and resources.
        models: the models that may be trained.
        purposes: what is computed.
        protection: how updates must be protected.
        metrics: what is told.
        server: the server to work for.
    """

    limits: Limits = field(default_factory=Limits)
    models: Models = field(default_factory=Models)
    purposes: Purposes = field(default_factory=Purposes)
    protection: Protection = field(default_factory=Protection)
    metrics: Metrics = field(default_factory=Metrics)
    server: Server = field(default_factory=Server)

    def allowing(self, names: Sequence[str]) -> "Policy":
        """This policy, with further models.

        Args:
            names: as in the table `models`.

        Raises:
            UsageError: a name is invalid.
        """
        models = replace(self.models, allow=(*self.models.allow, *names))
        if problems := models.problems():
            raise UsageError(*(f"--allow-model: {problem}" for problem in problems))
        return replace(self, models=models)

    def check_setup(
        self, *, model: str, image_size: int, threads: int, epochs: int, offer: ProtectionOffer, sums: bool,
        weighs_examples: bool,
    ) -> None:  # fmt: skip
        """Check a run's configuration before anything is built.

        Args:
            model: name of the model.
            image_size: side of the photos in pixels.
            threads: training threads; 0 for one per core.
            epochs: the largest number of epochs of any phase.
            offer: how updates are protected before they leave a store.
            sums: whether the run's algorithm computes sums over photos.
            weighs_examples: whether uploads are weighted by their number of photos.

        Raises:
            PolicyError: lists all that is not allowed.
        """
        limits = self.limits
        problems = [
            f"{what} {given:,} is more than {key} = {most:,}"
            for what, given, key, most in (
                ("image-size", image_size, "max-image-size", limits.max_image_size),
                ("threads", threads, "max-threads", limits.max_threads),
                ("local epochs", epochs, "max-local-epochs", limits.max_local_epochs),
            )
            if given > most
        ]
        if not self.models.allows(model):
            remedy = f". To run this code, start the client with --allow-model {model[:100]}" if is_own(model) else ""
            allowed = ", ".join(self.models.allow)
            problems.insert(0, f"model {model[:100]!r} is none of those allowed ({allowed}){remedy}")
        problems += self.protection.unmet(offer)
        if sums and not self.purposes.closed_form:
            problems.append("this store computes no sums over its photos: closed-form = false")
        if not self.metrics.example_counts and (sums or weighs_examples):
            remedy = "sums over photos contain it" if sums else "it weights uploads by it (--weights equal does not)"
            problems.append(f"this run needs the store's number of photos: {remedy}: example-counts = false")
        if problems:
            raise PolicyError(*problems)

    def check_task(self, broadcast: Broadcast, *, sums: bool) -> None:
        """Check what a task is for, and with how many others it is aggregated.

        Args:
            broadcast: the task.
            sums: whether the run's algorithm computes sums over photos.

        Raises:
            PolicyError: this store does not do it.
        """
        self.purposes.check(broadcast, sums=sums)
        self.protection.check_cohort(broadcast)
        if not self.metrics.example_counts and (broadcast.purpose is Purpose.EVALUATE or broadcast.closed_form):
            raise PolicyError("the answer would tell numbers of photos: example-counts = false")

    def check_photos(self, *, num_train: int, num_photos: int, batch_size: int, epochs: int) -> None:
        """Check on how few photos a step depends, and how many steps a task takes.

        The reasons do not tell the store's number of photos, which its policy may withhold.
        A server could also leave few photos to train on by its catalogue or by the share of validation photos.

        Args:
            num_train: the store's training photos in this run.
            num_photos: all of the store's photos.
            batch_size: photos per step.
            epochs: the largest number of epochs of any phase.

        Raises:
            PolicyError: photos are too few, or steps too many.
        """
        least = self.limits.min_photos_per_step
        if batch_size < min(least, num_train):
            raise PolicyError(f"steps of {counted(batch_size, 'photo')} are less than min-photos-per-step = {least}")
        if num_train < min(least, num_photos // 2):
            raise PolicyError(
                f"the catalogue and val-fraction leave fewer photos to train on than min-photos-per-step = {least}"
            )
        most = self.limits.max_local_steps
        if epochs * math.ceil(num_train / batch_size) > most:
            raise PolicyError(f"its local epochs have more steps than max-local-steps = {most:,}")

    def check_memory(self, num_bytes: float) -> None:
        """Check the memory that training needs.

        Raises:
            PolicyError: it is too much.
        """
        if num_bytes > 1e6 * self.limits.max_memory_mb:
            raise PolicyError(f"training needs {num_bytes / 1e6:,.0f} MB, more than max-memory-mb = "
                          f"{self.limits.max_memory_mb:,}")  # fmt: skip


STANDARD = Policy()
OPEN = Policy(
    limits=Limits(
        min_photos_per_step=1, min_epochs_per_task=0.0, max_local_epochs=UNLIMITED, max_local_steps=UNLIMITED,
        models_per_round=UNLIMITED,
        evaluations_per_round=UNLIMITED, comparisons_per_run=UNLIMITED, max_comparison_rounds=UNLIMITED,
        rounds_per_day=UNLIMITED, max_parameters=UNLIMITED, max_memory_mb=UNLIMITED, max_image_size=UNLIMITED,
        max_threads=1024, max_cache_mb=UNLIMITED,
    ),
    models=Models(allow=("*",)),
)  # fmt: skip
STRICT = Policy(
    limits=Limits(
        min_photos_per_step=8, min_epochs_per_task=1.0, evaluations_per_round=1, comparisons_per_run=0,
        rounds_per_day=100, max_local_epochs=10, max_local_steps=2_000, max_parameters=10_000_000, max_memory_mb=4_000,
        max_image_size=256, max_threads=8, max_cache_mb=5_000,
    ),
    models=Models(own_code=False),
    purposes=Purposes(compare=False, closed_form=False),
    protection=Protection(required="sample-dp", epsilon=8.0, delta=1e-5, min_cohort=3),
    metrics=Metrics(losses=False, per_product=False),
)  # fmt: skip
BUILT_IN = MappingProxyType({"standard": STANDARD, "open": OPEN, "strict": STRICT})


def load(name: str) -> Policy:
    """Load a policy.

    Args:
        name: `open`, `standard`, `strict`, or the path of a TOML file.

    Returns:
        The policy.

    Raises:
        UsageError: lists all problems: an unreadable file, unknown tables and keys (with the closest valid one),
            invalid values.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, ValueError, RuntimeError) as error:
        problem = "the name is empty" if not name else reason(error)
        if isinstance(error, UnicodeDecodeError):
            problem = f"{content_problem(error)}. Save it as UTF-8"
        raise UsageError(
            f"cannot read --policy {name or repr('')}: {problem}; give a TOML file, or one of {', '.join(BUILT_IN)}"
        ) from None
    return parse(text, where=name)


def parse(text: str, *, where: str) -> Policy:
    """Parse the text of a policy file.

    Args:
        text: TOML.
        where: its source, for error messages.

    Returns:
        The policy.

    Raises:
        UsageError: see `load`.
    """
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{where} is not valid TOML: {error}") from None
    problems: list[str] = []
    made: dict[str, Any] = {}
    for name, given in tables.items():
        if name not in TABLES:
            problems.append(f"unknown table [{name}] in {where}{did_you_mean(name, TABLES)}")
        elif not isinstance(given, dict):
            problems.append(f"{name} in {where} is a table: write [{name}] on a line of its own")
        else:
            made[name] = _table(name, given, where, problems)
    if problems:
        raise UsageError(*problems)
    return Policy(**made)


def keys(table: Callable[..., Any]) -> dict[str, Setting]:
    """The keys of a table as they are written, with help, bounds and default."""
    return {name.replace("_", "-"): setting for name, setting in settings_of(table).items()}


def _table(name: str, given: dict[str, Any], where: str, problems: list[str]) -> Any:
    """Make a table, or add what is wrong with it to `problems`."""
    known, values = keys(TABLES[name]), {}
    for key, value in given.items():
        if key not in known:
            problems.append(f"unknown key {key!r} in [{name}] of {where}{did_you_mean(key.replace('_', '-'), known)}")
        elif problem := _problem_with(value, known[key]):
            problems.append(f"{key} in [{name}] of {where}: {problem}")
        else:
            values[key.replace("-", "_")] = tuple(value) if isinstance(value, list) else value
    if problems:
        return None
    made = TABLES[name](**values)
    if name == "protection" and "required" not in given and (unused := [key for key in BUDGET if key in given]):
        problems.append(
            f"[protection] of {where} sets {' and '.join(unused)} to no effect, because it lacks required: write "
            'required = "sample-dp" to keep this budget, or "none" for no budget'
        )
    problems += [f"{problem}, in [{name}] of {where}" for problem in getattr(made, "problems", list)()]
    return made


def _problem_with(value: Any, setting: Setting) -> str:
    if setting.type is bool:
        return "" if isinstance(value, bool) else "neither true nor false"
    if setting.type in (int, float):
        if type(value) not in {int, setting.type}:
            return "not a whole number" if setting.type is int else "not a number"
        if not math.isfinite(value):
            return f"must be a finite number, such as {setting.default}"
        if setting.gt is not None or setting.lt is not None:
            low, high = setting.gt or 0, math.inf if setting.lt is None else setting.lt
            return "" if low < value < high else f"must be above {low:g}" + f" and below {high:g}" * (high < math.inf)
        return "" if value >= (setting.ge or 0) else f"must be at least {setting.ge:g}"
    if setting.type is str:
        return "" if isinstance(value, str) else "not a text in quotes"
    if choices := get_args(setting.type) if get_origin(setting.type) is Literal else ():
        return "" if value in choices else f"must be one of {', '.join(choices)}{did_you_mean(str(value), choices)}"
    is_list = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return "" if is_list and (value or not setting.default) else 'not a list of texts, such as ["resnet*"]'
