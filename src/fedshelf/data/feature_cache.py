"""A disk cache of what a frozen backbone makes of each photo, in one SQLite file per backbone.

It can be deleted at any time: losing it costs time. A damaged file is deleted, and one that cannot be written to is
done without. Several processes may use one at the same time.

Shapes: D features.
"""

import logging
import os
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedshelf.data import cache_index
from fedshelf.storage.atomic_files import make_private_folder, open_private

_BUSY_SECONDS = 60
_AT_ONCE = 500  # keys in one query; SQLite allows about a thousand variables
_SCHEMA = "CREATE TABLE IF NOT EXISTS features (key BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID"
_T = TypeVar("_T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureCache:
    """Features by key.

    Attributes:
        path: the file; created, readable by its owner only, if it does not exist.
    """

    path: Path

    def find(self, keys: Sequence[bytes]) -> dict[bytes, NDArray[np.float32]]:
        """The known features [D] among `keys`."""

        def select(database: sqlite3.Connection) -> dict[bytes, NDArray[np.float32]]:
            found = {}
            for start in range(0, len(keys), _AT_ONCE):
                some = keys[start : start + _AT_ONCE]
                marks = ",".join("?" * len(some))
                rows = database.execute(f"SELECT key, vector FROM features WHERE key IN ({marks})", some)  # noqa: S608
                found.update({key: np.frombuffer(vector, np.float32) for key, vector in rows})
            return found

        return self._in_transaction(select) or {}

    def add(self, features: Mapping[bytes, NDArray[np.float32]]) -> None:
        """Store features [D] by key."""
        rows = [(key, vector.tobytes()) for key, vector in features.items()]
        self._in_transaction(
            lambda database: database.executemany("INSERT OR IGNORE INTO features VALUES (?, ?)", rows)
        )

    def _in_transaction(self, job: Callable[[sqlite3.Connection], _T]) -> _T | None:
        """Do `job` in one transaction; if the file cannot be used, log it and return None."""
        try:
            make_private_folder(self.path.parent)
            os.close(open_private(self.path, os.O_RDWR | os.O_CREAT))  # SQLite gives its journal the same mode
            with closing(sqlite3.connect(self.path, timeout=_BUSY_SECONDS)) as database, database:
                database.execute(_SCHEMA)
                return job(database)
        except (OSError, sqlite3.Error) as error:
            if isinstance(error, sqlite3.Error) and cache_index.is_damage(error):
                cache_index.discard(self.path)
            logger.warning("the cache of features '%s' cannot be used, they are computed again: %s", self.path, error)
            return None
