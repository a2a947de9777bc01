"""The index of the photo cache, in one SQLite file.

* files: the content digest of each file, by device and inode; valid while size and modification time are unchanged.
  Keyed by inode, so that a hard link is not hashed again.
* contents: for each digest and image size, the row of a pack that holds the decoded pixels, or why there are none.
* packs: the checksum of each pack file.

The index can be rebuilt: losing it costs time, never photos. A damaged one is deleted.
"""

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedshelf.storage.atomic_files import open_private

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE files (
    device INTEGER, inode INTEGER, size INTEGER, mtime_ns INTEGER, digest BLOB, PRIMARY KEY (device, inode));
CREATE TABLE contents (
    digest BLOB, variant TEXT, pack TEXT, row INTEGER, problem TEXT, PRIMARY KEY (digest, variant)) WITHOUT ROWID;
CREATE INDEX contents_by_pack ON contents (pack);
CREATE TABLE packs (pack TEXT PRIMARY KEY, checksum INTEGER, used REAL);
"""
_BUSY_SECONDS = 60
# A file modified this shortly before it was hashed may change again within the same time stamp, so it is not trusted.
_TIMESTAMP_SLACK_NS = 2_000_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """Where a photo's pixels are.

    Attributes:
        pack: the pack that holds them; None if the photo cannot be decoded.
        row: row of the pack.
        problem: why the photo cannot be decoded.
    """

    pack: str | None = None
    row: int = 0
    problem: str = ""


class CacheIndex:
    """An open index. Use it as a context manager; every method is one transaction.

    Args:
        path: the SQLite file.
    """

    def __init__(self, path: Path) -> None:
        self._database = _open(path)

    def __enter__(self) -> "CacheIndex":
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def known_digest(self, status: os.stat_result) -> bytes | None:
        """The content digest of the file with this status, if it has been hashed and not changed since."""
        row = self._database.execute(
            "SELECT digest FROM files WHERE device = ? AND inode = ? AND size = ? AND mtime_ns = ?", _file_key(status)
        ).fetchone()
        return None if row is None else bytes(row[0])

    def remember_digests(self, files: Iterable[tuple[os.stat_result, bytes]], *, hashed_at_ns: int) -> None:
        """Store content digests.

        Args:
            files: status and digest of each file.
            hashed_at_ns: wall-clock time before the first file was read.
        """
        rows = [
            (*_file_key(status), digest)
            for status, digest in files
            if status.st_mtime_ns < hashed_at_ns - _TIMESTAMP_SLACK_NS
        ]
        with self._transaction():
            self._database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", rows)

    def contents(self, digests: Iterable[bytes], variant: str) -> dict[bytes, Content]:
        """Look up contents in a variant (image size and format version)."""
        found: dict[bytes, Content] = {}
        for digest in set(digests):
            row = self._database.execute(
                "SELECT pack, row, problem FROM contents WHERE digest = ? AND variant = ?", (digest, variant)
            ).fetchone()
            if row is not None:
                found[digest] = Content(pack=row[0], row=row[1], problem=row[2])
        return found

    def add_pack(self, pack: str, checksum: int, digests: Sequence[bytes], variant: str) -> None:
        """Add a pack.

        Args:
            pack: its path below the cache folder.
            checksum: checksum of its bytes.
            digests: digest of the content in each row.
            variant: image size and format version.
        """
        rows = [(digest, variant, pack, row, "") for row, digest in enumerate(digests)]
        with self._transaction():
            self._database.execute("INSERT OR REPLACE INTO packs VALUES (?, ?, ?)", (pack, checksum, time.time()))
            self._database.executemany("INSERT OR REPLACE INTO contents VALUES (?, ?, ?, ?, ?)", rows)

    def add_problems(self, problems: Iterable[tuple[bytes, str]], variant: str) -> None:
        """Add contents that cannot be decoded, with the reason."""
        rows = [(digest, variant, None, 0, reason) for digest, reason in problems]
        with self._transaction():
            self._database.executemany("INSERT OR REPLACE INTO contents VALUES (?, ?, ?, ?, ?)", rows)

    def checksum(self, pack: str) -> int | None:
        """The checksum of a pack's bytes as written; None if the pack is unknown."""
        row = self._database.execute("SELECT checksum FROM packs WHERE pack = ?", (pack,)).fetchone()
        return None if row is None else int(row[0])

    def touch(self, pack: str) -> None:
        """Record that a pack is in use, to the day, so that most openings write nothing."""
        now = time.time()
        with self._transaction():
            self._database.execute("UPDATE packs SET used = ? WHERE pack = ? AND used < ?", (now, pack, now - 86_400))

    def forget_pack(self, pack: str) -> None:
        """Remove a missing or damaged pack; its contents will be decoded again."""
        with self._transaction():
            self._database.execute("DELETE FROM contents WHERE pack = ?", (pack,))
            self._database.execute("DELETE FROM packs WHERE pack = ?", (pack,))

    def superseded_packs(self, *, unused_since: float) -> list[str]:
        """Packs not used since a given time whose rows are all in newer packs, too."""
        rows = self._database.execute(
            "SELECT pack FROM packs WHERE used < ? AND pack NOT IN (SELECT pack FROM contents WHERE pack NOT NULL)",
            (unused_since,),
        )
        return [row[0] for row in rows]

    def packs_by_use(self) -> list[str]:
        """All packs, the one that was not used for longest first."""
        return [row[0] for row in self._database.execute("SELECT pack FROM packs ORDER BY used")]

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")


def is_damage(error: sqlite3.Error) -> bool:
    """Whether an error means that the index is damaged, rather than locked, full or not writable."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    return code & 0xFF in {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def discard(path: Path) -> None:
    """Delete an index."""
    for suffix in ("", "-journal"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _open(path: Path) -> sqlite3.Connection:
    os.close(open_private(path, os.O_RDWR | os.O_CREAT))  # SQLite gives its journal the same mode
    database = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
    try:
        database.execute("BEGIN IMMEDIATE")
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            for statement in _SCHEMA.split(";"):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        database.execute("COMMIT")
        if version not in {0, _SCHEMA_VERSION}:
            raise sqlite3.DatabaseError(f"index of version {version}")
    except BaseException:
        database.close()
        raise
    return database


def _file_key(status: os.stat_result) -> tuple[int, int, int, int]:
    # SQLite's integers are signed: wrap device and inode numbers of the upper half.
    return (_signed(status.st_dev), _signed(status.st_ino), status.st_size, status.st_mtime_ns)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
