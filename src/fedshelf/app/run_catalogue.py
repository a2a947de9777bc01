"""A run's catalogue in its folder: changed by a person, and noticed by a running server between two rounds.

`catalogue.json` alone says which products the model has. It is replaced as a whole, so a server that is killed at any
moment finds either the former catalogue or the new one, and grows what it has saved to what it finds.
"""

import logging
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from fedshelf.algorithms.base import Asynchronous
from fedshelf.app.components import algorithm_of, encryption_of
from fedshelf.config import files
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import DataError, UsageError
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.catalogue_changes import problem_with_change, with_products
from fedshelf.storage.lock import file_lock
from fedshelf.storage.run_directory import RunDirectory

logger = logging.getLogger(__name__)

NOT_YET = "its catalogue is made when enough stores have joined. Wait for round 1, or give the products by --catalogue"


class RunCatalogue:
    """The catalogue that a server uses, and the file that it is in.

    Args:
        directory: the run's folder.
        config: the run's configuration.
    """

    def __init__(self, directory: RunDirectory, config: RunConfig) -> None:
        self._path = directory.catalogue
        self._config = config
        self._seen: tuple[int, int, int] | None = None
        self.used = Catalogue.load(self._path) if self._path.exists() else None

    def use(self, catalogue: Catalogue) -> None:
        """Use a catalogue, and save that of a new run. The file of a resumed one stays as it is: it may have grown.

        Raises:
            RunError: the file cannot be written.
        """
        if self.used is None:
            catalogue.save(self._path)
        self.used = catalogue

    def changed(self) -> Catalogue | None:
        """The catalogue in the file, to be used from now on; None if it is the one in use, or cannot be used."""
        seen = _stamp(self._path)
        if seen is None or seen == self._seen or self.used is None:
            return None
        self._seen = seen
        try:
            found = Catalogue.load(self._path)
            problems = [] if found.digest == self.used.digest else problems_with_changes(self._config)
            if problem := problem_with_change(self.used, found):
                problems.append(problem)
        except DataError as error:
            problems = [str(error)]
        if problems:
            logger.warning("the changed catalogue '%s' is not used: %s", self._path, "; ".join(problems))
            return None
        if found.digest == self.used.digest:
            return None
        self.used = found
        return found


def problems_with_changes(config: RunConfig) -> list[str]:
    """Why the catalogue of a run with this configuration cannot change; empty if it can."""
    problems = []
    if config.dp != "none":
        problems.append(
            f"--dp {config.dp}: the noise of this run was planned for the photos and the model that it began with"
        )
    if encryption_of(config).is_on:
        problems.append("--he: the stores' keys and ciphertexts were made for a model of the size that it began with")
    if isinstance(algorithm_of(config), Asynchronous):
        problems.append(
            f"--algorithm {config.algorithm}: there is no moment between two rounds at which no store trains"
        )
    if config.teacher is not None or config.teacher_digest is not None:
        problems.append("--teacher: the teacher does not know products that it was not trained on")
    if config.train == "sales":
        problems.append("--train sales: the output layer is frozen and would never learn a new product")
    return problems


def add_products(directory: RunDirectory, products: Sequence[str], *, allow_similar: bool = False) -> Catalogue:
    """Add products to a run's catalogue. Those that it has already are left out.

    Args:
        directory: the run's folder.
        products: names.
        allow_similar: see `with_products`.

    Returns:
        The catalogue before the change.

    Raises:
        UsageError: the run has no catalogue yet, or cannot change it; all reasons are listed.
        DataError: names cannot be used; all problems are listed.
        RunError: the file cannot be written.
    """
    with file_lock(_lock(directory)):
        before = _loaded(directory)
        after = with_products(before, products, allow_similar=allow_similar)
        if after != before:
            after.save(directory.catalogue)
    return before


def add_aliases(directory: RunDirectory, aliases: Mapping[str, str]) -> Catalogue:
    """Add other names of products to a run's catalogue.

    Args:
        directory: the run's folder.
        aliases: the product by alias.

    Returns:
        The catalogue before the change.

    Raises:
        UsageError: see `add_products`.
        DataError: aliases contradict the catalogue; all problems are listed.
        RunError: the file cannot be written.
    """
    with file_lock(_lock(directory)):
        before = _loaded(directory)
        after = before.with_aliases(aliases)
        if after != before:
            after.save(directory.catalogue)
    return before


def _loaded(directory: RunDirectory) -> Catalogue:
    if not directory.catalogue.exists():
        raise UsageError(f"run {directory.run_id} has no catalogue yet: {NOT_YET}")
    values = tomllib.loads(files.with_new_names(directory.config_toml))
    config = files.parse(RunConfig, values, where=f"'{directory.config}'")
    if problems := problems_with_changes(config):
        raise UsageError(*(f"the catalogue of run {directory.run_id} cannot change: {problem}" for problem in problems))
    return Catalogue.load(directory.catalogue)


def _lock(directory: RunDirectory) -> Path:
    return directory.path / "catalogue.lock"


def _stamp(path: Path) -> tuple[int, int, int] | None:
    with suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns, found.st_size
    return None
