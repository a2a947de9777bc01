"""One run's folder: where everything is, which configuration it belongs to, and who is writing to it."""

import datetime
import json
import secrets
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fedshelf.core.errors import RunError
from fedshelf.storage import lock as locks
from fedshelf.storage.atomic_files import make_folder, saying_what_to_do, write_atomically

SCHEMA_VERSION = 1
_IDENTITY = "run.json"
_CONFIG = "config.toml"
_LOCK = "lock"


def new_run_id(now: datetime.datetime | None = None) -> str:
    """A fresh id such as `20261121-083512-a1b2`: ids sort by the (UTC) second they were made in."""
    moment = now or datetime.datetime.now(datetime.UTC)
    return f"{moment:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunDirectory:
    """`path` and what is in it; `created` is the moment (UTC, ISO 8601) it was made."""

    path: Path
    run_id: str
    config_digest: str
    created: str

    @property
    def config(self) -> Path:
        return self.path / _CONFIG

    @property
    def database(self) -> Path:
        return self.path / "run.db"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def spool(self) -> Path:
        return self.path / "spool"

    @property
    def client_states(self) -> Path:
        """What simulated clients keep between rounds."""
        return self.path / "clients"

    @property
    def engine(self) -> Path:
        """Which engine a simulation has chosen for itself, and why."""
        return self.path / "engine.json"

    @property
    def incoming(self) -> Path:
        """What is being received."""
        return self.path / "incoming"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def best_model(self) -> Path:
        return self.model / "best"

    @property
    def stores(self) -> Path:
        """The models that simulated stores keep, a folder for each."""
        return self.path / "stores"

    @property
    def catalogue(self) -> Path:
        return self.path / "catalogue.json"

    @property
    def config_toml(self) -> str:
        """The effective configuration, as text.

        Raises:
            RunError: the file cannot be read.
        """
        with saying_what_to_do("read", self.config):
            return self.config.read_text(encoding="utf-8")

    @classmethod
    def create(cls, path: Path, *, run_id: str, config_toml: str, config_digest: str) -> "RunDirectory":
        """Make the folder of a new run.

        Raises:
            RunError: the folder holds a run or other files already, or cannot be written.
        """
        make_folder(path)
        if is_run(path):
            raise RunError(f"'{path}' already holds run {cls.open(path).run_id}. Choose another --run-dir.")
        with saying_what_to_do("read", path):
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
        """Find the run in `path`.

        Raises:
            RunError: there is none, its identity cannot be read, or a newer FedShelf made it.
        """
        identity = path / _IDENTITY
        if not is_run(path):
            raise RunError(
                f"'{path}' holds no run: there is no {_IDENTITY} in it. 'fedshelf runs list' shows the runs."
            )
        with saying_what_to_do("read", identity):
            text = identity.read_text(encoding="utf-8")
        try:
            fields = json.loads(text)
            schema = fields["schema"]
            if schema > SCHEMA_VERSION:
                raise RunError(f"'{path}' was made by a newer FedShelf (schema {schema}). Use that version, or newer.")
            return cls(
                path=path,
                run_id=fields["run_id"],
                config_digest=fields["config_digest"],
                created=fields["created"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"'{identity}' is damaged ({error!r}): restore it, or start a new run.") from error

    def replace_config(self, config_toml: str, config_digest: str) -> "RunDirectory":
        """Write down a changed configuration (a run that is extended, say), its digest last.

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
        """Remove a run that never began, as far as the system allows it."""
        with suppress(OSError):
            for path in self.path.iterdir():
                if not path.name.startswith("."):  # the user's own, as in `create`
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.path.rmdir()

    def lock(self) -> locks.RunLock:
        """Become the one process that writes here, for as long as the lock is kept.

        Raises:
            RunError: another process is; the message has its id.
        """
        return locks.RunLock(self.path / _LOCK)

    def owner(self) -> int | None:
        """The id of the process that runs this run now, or None."""
        return locks.owner(self.path / _LOCK)

    def process(self) -> psutil.Process | None:
        """The process that runs this run now, or None.

        Raises:
            RunError: see `storage.lock.holder`.
        """
        return locks.holder(self.path / _LOCK)


def is_run(path: Path) -> bool:
    """Whether `path` is a run's folder (its identity is written last when it is made)."""
    return (path / _IDENTITY).is_file()


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One key (dotted) that two configurations set differently; None where one of them does not set it."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        old, new = ("not set" if value is None else repr(value) for value in (self.old, self.new))
        return f"{self.key}: {old} → {new}"


def differences(old_toml: str, new_toml: str) -> tuple[Difference, ...]:
    """The keys on which two configurations differ, sorted by name.

    Raises:
        RunError: one of the texts is not TOML.
    """
    try:
        old, new = (dict(_flatten(tomllib.loads(text))) for text in (old_toml, new_toml))
    except tomllib.TOMLDecodeError as error:
        raise RunError(f"a run's {_CONFIG} is not TOML: {error}. Restore it, or start a new run.") from error
    keys = sorted(old.keys() | new.keys())
    # Types count, too: 1, 1.0 and true are equal to Python, not to a reader.
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
