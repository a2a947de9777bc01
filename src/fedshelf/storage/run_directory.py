"""A run's folder: its paths, its configuration, and its lock."""

import datetime
import json
import secrets
import shutil
import stat
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fedshelf.core.errors import RunError
from fedshelf.core.system_errors import content_problem, reason
from fedshelf.storage import lock as locks
from fedshelf.storage.atomic_files import make_folder, refuse_link, translating_os_errors, write_atomically

SCHEMA_VERSION = 1
_IDENTITY = "run.json"
_CONFIG = "config.toml"
_LOCK = "lock"
_MAX_IDENTITY_BYTES = 1 << 16


def new_run_id(now: datetime.datetime | None = None) -> str:
    """A new id such as `20261121-083512-a1b2`. Ids sort by the UTC second of their creation."""
    moment = now or datetime.datetime.now(datetime.UTC)
    return f"{moment:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunDirectory:
    """A run's folder.

    Attributes:
        path: the folder.
        run_id: the run.
        config_digest: digest of the run's configuration.
        created: time of creation (UTC, ISO 8601).
    """

    path: Path
    run_id: str
    config_digest: str
    created: str

    @property
    def config(self) -> Path:
        """The run's configuration, as it was created with (TOML)."""
        return self.path / _CONFIG

    @property
    def database(self) -> Path:
        """What happened in each round (SQLite)."""
        return self.path / "run.db"

    @property
    def checkpoints(self) -> Path:
        """The server's state after recent rounds."""
        return self.path / "checkpoints"

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a state to resume from."""
        return any(self.checkpoints.glob("round-*.safetensors"))

    @property
    def spool(self) -> Path:
        """Uploads of the open round."""
        return self.path / "spool"

    @property
    def client_states(self) -> Path:
        """State of simulated clients between rounds."""
        return self.path / "clients"

    @property
    def engine(self) -> Path:
        """The engine that a simulation has chosen, and why."""
        return self.path / "engine.json"

    @property
    def incoming(self) -> Path:
        """Messages being received."""
        return self.path / "incoming"

    @property
    def model(self) -> Path:
        """The newest model, as published."""
        return self.path / "model"

    @property
    def best_model(self) -> Path:
        """The model of the best round."""
        return self.model / "best"

    @property
    def stores(self) -> Path:
        """Models kept by simulated stores, one folder each."""
        return self.path / "stores"

    @property
    def initial_model(self) -> Path:
        """The model before the first round, of a run that starts from given weights."""
        return self.path / "initial"

    @property
    def catalogue(self) -> Path:
        """The products by index."""
        return self.path / "catalogue.json"

    @property
    def confusion(self) -> Path:
        """The confusion matrix on the test photos, after the last round."""
        return self.path / "confusion.csv"

    @property
    def config_toml(self) -> str:
        """The effective configuration as text.

        Raises:
            RunError: the file cannot be read, or is not TOML.
        """
        with translating_os_errors("read", self.config):
            text = self.config.read_text(encoding="utf-8", errors="replace")
        try:
            tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise RunError(
                f"'{self.config}' is not valid TOML: {error}. Restore it from a copy, or start a new run with another "
                "--run-dir"
            ) from error
        return text

    @classmethod
    def create(cls, path: Path, *, run_id: str, config_toml: str, config_digest: str) -> "RunDirectory":
        """Create the folder of a new run.

        Args:
            path: the folder.
            run_id: the run.
            config_toml: its configuration.
            config_digest: digest of the configuration.

        Raises:
            RunError: the folder already holds a run or other files, or cannot be written.
        """
        make_folder(path)
        if is_run(path):
            raise RunError(f"'{path}' already holds run {cls.open(path).run_id}. Choose another --run-dir.")
        with translating_os_errors("read", path):
            unknown_files = sorted(
                p.name for p in path.iterdir() if p.name not in (_CONFIG, _LOCK) and p.name[0] != "."
            )
        if unknown_files:
            raise RunError(
                f"'{path}' is not empty and holds no run (there is '{unknown_files[0]}' in it). "
                f"Choose an empty or a new folder for --run-dir."
            )
        created = datetime.datetime.now(datetime.UTC).isoformat()
        directory = cls(path=path, run_id=run_id, config_digest=config_digest, created=created)
        directory.replace_config(config_toml, config_digest)
        return directory

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Open an existing run.

        Raises:
            RunError: there is no run in `path`, its identity cannot be read, or it was created by a newer FedShelf.
        """
        identity = path / _IDENTITY
        if not is_run(path):
            raise RunError(
                f"'{path}' holds no run: there is no {_IDENTITY} in it. 'fedshelf runs list' shows the runs."
            )
        with translating_os_errors("read", identity), identity.open("rb") as file:
            content = file.read(_MAX_IDENTITY_BYTES)
        try:
            fields = json.loads(content)
            schema = fields["schema"]
            if schema > SCHEMA_VERSION:
                raise RunError(f"'{path}' was made by a newer FedShelf (schema {schema}). Use that version, or newer.")
            given = {name: fields[name] for name in ("run_id", "config_digest", "created")}
            if not all(isinstance(value, str) for value in given.values()):
                raise TypeError("not text")
            return cls(path=path, **given)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunError(
                f"'{identity}' is damaged: {content_problem(error)}. Restore it, or start a new run."
            ) from error

    def replace_config(self, config_toml: str, config_digest: str) -> "RunDirectory":
        """Save a changed configuration, for example of an extended run; the digest is written last.

        Returns:
            The run with its new configuration.

        Raises:
            RunError: a file cannot be written.
        """
        identity = {
            "schema": SCHEMA_VERSION,
            "run_id": self.run_id,
            "config_digest": config_digest,
            "created": self.created,
        }
        write_atomically(self.config, config_toml)
        write_atomically(self.path / _IDENTITY, json.dumps(identity, indent=1) + "\n")
        return RunDirectory(path=self.path, run_id=self.run_id, config_digest=config_digest, created=self.created)

    def remove(self) -> None:
        """Remove a run that has not started, as far as the system allows."""
        with suppress(OSError):
            for path in self.path.iterdir():
                if not path.name.startswith("."):  # hidden files belong to the user, as in `create`
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            self.path.rmdir()

    def lock(self) -> locks.RunLock:
        """Acquire the exclusive right to write to this folder.

        Raises:
            RunError: another process holds it (the message has its id), or one of the run's files or folders is a
                symbolic link.
        """
        for path in (
            self.config, self.database, self.checkpoints, self.spool, self.client_states, self.engine, self.incoming,
            self.model, self.best_model, self.stores, self.catalogue, self.confusion, self.path / _LOCK,
            self.path / _IDENTITY,
        ):  # fmt: skip
            refuse_link(path)
        return locks.RunLock(self.path / _LOCK)

    def owner(self) -> int | None:
        """The id of the process that currently runs this run, or None."""
        return locks.owner(self.path / _LOCK)

    def process(self) -> psutil.Process | None:
        """The process that currently runs this run, or None.

        Raises:
            RunError: see `storage.lock.holder`.
        """
        return locks.holder(self.path / _LOCK)


def is_run(path: Path) -> bool:
    """Whether `path` is a run's folder. A new run's identity is written last.

    Raises:
        RunError: `path` cannot be read, or is a link that leads back to itself.
    """
    try:
        return stat.S_ISREG((path / _IDENTITY).stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise RunError(f"'{path}' cannot be read: {reason(error)}.") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A key on which two configurations differ.

    Attributes:
        key: the key, dotted.
        old: the old value; None if it is not set.
        new: the new value; None if it is not set.
    """

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        old, new = ("not set" if value is None else repr(value) for value in (self.old, self.new))
        return f"{self.key}: {old} → {new}"


def differences(old_toml: str, new_toml: str) -> tuple[Difference, ...]:
    """The keys on which two configurations, as TOML, differ, sorted by name."""
    old, new = (dict(_flatten(tomllib.loads(text))) for text in (old_toml, new_toml))
    keys = sorted(old.keys() | new.keys())
    # Compare types, too: 1, 1.0 and true are equal in Python, but not to a reader.
    return tuple(
        Difference(key=key, old=old.get(key), new=new.get(key))
        for key in keys
        if repr(old.get(key)) != repr(new.get(key))
    )


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
