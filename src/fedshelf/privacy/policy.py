"""A store's policy: what this client does for a server, whatever the server asks for.

A policy is a TOML file with one table per class in `TABLES`. A key that is left out has the value of the built-in
policy `standard`. To add a table, add a frozen dataclass, a field of `Policy`, and a line to `TABLES`.

The limits bound how often, and on how few photos, a server may compute something from this store's photos. They do not
make a single answer harmless: weights that are made for the purpose can hold photos back from most of a batch, so that
the rest shows in the difference. Only secure aggregation, or clipping with noise, supports that promise.
"""

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from fedshelf.core.errors import PolicyError, UsageError
from fedshelf.core.settings import Setting, settings_of
from fedshelf.core.system_errors import reason
from fedshelf.core.text import counted, did_you_mean
from fedshelf.models.registry import MODELS, is_own, problem_with_own

UNLIMITED = 2**62


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits on what a server may ask for.

    Attributes:
        min_photos_per_step: minimum batch size. A store with fewer photos trains on all of them at once. At least so
            many of its photos, or half of them, take part in training.
        min_epochs_per_task: minimum share of an epoch in a training task.
        models_per_round: different models, control variates or learning rates to train with under one round number.
        evaluations_per_round: evaluations under one round number.
        comparisons_per_run: model comparisons in a run.
        max_comparison_rounds: rounds that a comparison trains the store's own model for.
        rounds_per_day: training tasks and comparisons in 24 hours, over all runs and servers; of evaluations,
            `evaluations_per_round` times as many.
        max_local_epochs: maximum number of epochs in a training task.
        max_parameters: values of the model.
        max_memory_mb: megabytes that training needs, as measured on two photos.
        max_image_size: side of the training photos in pixels.
        max_threads: training threads.
        max_cache_mb: megabytes of the cache of decoded photos.
    """

    min_photos_per_step: Annotated[int, Setting(help="minimum batch size", ge=1)] = 8
    min_epochs_per_task: Annotated[float, Setting(help="minimum share of an epoch in a task", ge=0)] = 0.25
    models_per_round: Annotated[int, Setting(help="models to train under one round number", ge=1)] = 1
    evaluations_per_round: Annotated[int, Setting(help="evaluations under one round number", ge=0)] = 2
    comparisons_per_run: Annotated[int, Setting(help="model comparisons in a run", ge=0)] = 1
    max_comparison_rounds: Annotated[int, Setting(help="rounds of training in a comparison", ge=1)] = 1000
    rounds_per_day: Annotated[int, Setting(help="training tasks in 24 hours", ge=1)] = 1000
    max_local_epochs: Annotated[int, Setting(help="maximum epochs in a task", ge=1)] = 100
    max_parameters: Annotated[int, Setting(help="values of the model", ge=1)] = 50_000_000
    max_memory_mb: Annotated[int, Setting(help="megabytes that training needs", ge=1)] = 8_000
    max_image_size: Annotated[int, Setting(help="side of the photos in pixels", ge=8)] = 512
    max_threads: Annotated[int, Setting(help="training threads", ge=1)] = 64
    max_cache_mb: Annotated[int, Setting(help="megabytes of the photo cache", ge=1)] = 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    """The models that this store trains.

    Attributes:
        allow: names; `*` stands for any characters, but not in the name of a user's own code, `MODULE:FUNCTION`.
    """

    allow: Annotated[tuple[str, ...], Setting(help="names, where * stands for any characters")] = (
        *MODELS, "resnet*", "mobilenet*", "tf_mobilenet*", "efficientnet*", "tf_efficientnet*", "convnext*", "regnet*",
        "densenet*",
    )  # fmt: skip

    def allows(self, name: str) -> bool:
        """Whether this store trains a model of that name."""
        return name in self.allow or (not is_own(name) and any(fnmatchcase(name, pattern) for pattern in self.allow))

    def problems(self) -> list[str]:
        """What is wrong with the names of users' own code, of which none may be a pattern."""
        return [problem for name in self.allow if is_own(name) and (problem := problem_with_own(name))]


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """What this store reports besides what training needs.

    Attributes:
        per_product: after the last round, how many validation photos of each product are classified correctly.
    """

    per_product: Annotated[bool, Setting(help="correct validation photos of each product")] = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """The server that this store works for.

    Attributes:
        roster_key: the chain's public key, which signs the roster; "" for the one that enrolling gives.
    """

    roster_key: Annotated[str, Setting(help="the chain's public key, from 'fedshelf enroll key'")] = ""

    def problems(self) -> list[str]:
        """What is wrong with the values."""
        from fedshelf.identity.keys import PublicKey  # loads cryptography, which a simulation does not need

        is_key = not self.roster_key or PublicKey(self.roster_key).is_valid
        return [] if is_key else ["roster-key is not a key as 'fedshelf enroll key' prints it, of 44 characters"]


TABLES = MappingProxyType({"limits": Limits, "models": Models, "metrics": Metrics, "server": Server})
"""The tables of a policy file by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """A store's policy. The defaults are those of `standard`.

    Attributes:
        limits: limits on tasks and resources.
        models: the models that may be trained.
        metrics: what is reported.
        server: the server to work for.
    """

    limits: Limits = field(default_factory=Limits)
    models: Models = field(default_factory=Models)
    metrics: Metrics = field(default_factory=Metrics)
    server: Server = field(default_factory=Server)

    def allowing(self, names: Sequence[str]) -> "Policy":
        """This policy, with further models.

        Args:
            names: as in the table `models`.

        Raises:
            UsageError: a name is invalid.
        """
        models = Models(allow=(*self.models.allow, *names))
        if problems := models.problems():
            raise UsageError(*(f"--allow-model: {problem}" for problem in problems))
        return replace(self, models=models)

    def check_setup(self, *, model: str, image_size: int, threads: int, epochs: int) -> None:
        """Check a run's configuration before anything is built.

        Args:
            model: name of the model.
            image_size: side of the photos in pixels.
            threads: training threads; 0 for one per core.
            epochs: the largest number of epochs of any phase.

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
        if problems:
            raise PolicyError(*problems)

    def check_photos(self, *, num_train: int, num_photos: int, batch_size: int) -> None:
        """Check on how few photos a step depends.

        A server could also leave few photos to train on by its catalogue or by the share of validation photos.

        Args:
            num_train: the store's training photos in this run.
            num_photos: all of the store's photos.
            batch_size: photos per step.

        Raises:
            PolicyError: they are too few.
        """
        least = self.limits.min_photos_per_step
        if batch_size < min(least, num_train):
            raise PolicyError(f"steps of {counted(batch_size, 'photo')} are less than min-photos-per-step = {least}")
        if num_train < min(least, num_photos // 2):
            raise PolicyError(
                f"the catalogue and val-fraction leave {num_train} of {counted(num_photos, 'photo')} to train on, less "
                f"than min-photos-per-step = {least}"
            )

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
        min_photos_per_step=1, min_epochs_per_task=0.0, max_local_epochs=UNLIMITED, models_per_round=UNLIMITED,
        evaluations_per_round=UNLIMITED, comparisons_per_run=UNLIMITED, max_comparison_rounds=UNLIMITED,
        rounds_per_day=UNLIMITED, max_parameters=UNLIMITED, max_memory_mb=UNLIMITED, max_image_size=UNLIMITED,
        max_threads=1024, max_cache_mb=UNLIMITED,
    ),
    models=Models(allow=("*",)),
)  # fmt: skip
BUILT_IN = MappingProxyType({"standard": STANDARD, "open": OPEN})


def load(name: str) -> Policy:
    """Load a policy.

    Args:
        name: `standard`, `open`, or the path of a TOML file.

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
        raise UsageError(
            f"cannot read --policy {name}: {reason(error)}; give a TOML file, or one of {', '.join(BUILT_IN)}"
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
    problems += [f"{problem}, in [{name}] of {where}" for problem in getattr(made, "problems", list)()]
    return made


def _problem_with(value: Any, setting: Setting) -> str:
    if setting.type is bool:
        return "" if isinstance(value, bool) else "neither true nor false"
    if setting.type in (int, float):
        if type(value) not in {int, setting.type}:
            return "not a whole number" if setting.type is int else "not a number"
        return "" if value >= (setting.ge or 0) else f"must be at least {setting.ge:g}"
    if setting.type is str:
        return "" if isinstance(value, str) else "not a text in quotes"
    is_list = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
    return "" if is_list else 'not a list of texts, such as ["resnet*"]'
