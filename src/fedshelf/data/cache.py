"""A memory-mapped disk cache of decoded photos, so that a store's photos are decoded only once.

Layout of the cache folder (mode 0700, because it holds small copies of the store's photos)::

    index.sqlite                  digests of files and contents, see `cache_index`
    <variant>/<digest>.rgb        one pack per list of photos: uint8 [N, S, S, 3], nothing else

A pack is named by the digests of its contents in order, so it is never modified, only replaced by another. A list with
one more photo becomes a new pack, whose other rows are copied from existing packs: each content is decoded once,
independent of the store or link that it is reached by. Packs are written under a temporary name and renamed, and
checked by size and checksum when opened, so a crash, a concurrent process or a damaged file only costs time.

Shapes: N photos, S the image size.
"""

import errno
import hashlib
import logging
import os
import sqlite3
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedshelf.core.errors import DataError, PolicyError
from fedshelf.core.system_errors import reason
from fedshelf.core.text import counted
from fedshelf.data import cache_index, pack
from fedshelf.data.cache_index import CacheIndex, Content
from fedshelf.data.decode import DECODER_VERSION, MissingDecoderError, UnusablePhotoError, decode
from fedshelf.data.filesystem import cause
from fedshelf.data.photo_files import Photo
from fedshelf.storage.atomic_files import make_private_folder

MAX_FILE_BYTES = 256 << 20
_THREADS = 4
_CHUNK = 256  # photos decoded per write, which bounds the memory
_KEEP_SUPERSEDED_SECONDS = 7 * 86_400
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_PROBLEMS_NAMED = 20

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A photo that was left out.

    Attributes:
        path: the file.
        reason: why.
    """

    path: Path
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CachedPhotos:
    """Decoded photos.

    Attributes:
        images: uint8 [N, S, S, 3], read-only and memory-mapped; index it with a list (which copies) to make a
            batch.
        kept: row i shows `photos[kept[i]]`.
        problems: photos that were left out.
    """

    images: NDArray[np.uint8]
    kept: tuple[int, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PhotoCache:
    """A cache folder, created on first use. Any number of processes may use it at the same time.

    Attributes:
        root: the folder.
        max_bytes: the maximum size of all packs. For a new one, those that were not used for longest are deleted.
    """

    root: Path
    max_bytes: int | None = None

    def open(
        self,
        photos: Sequence[Photo],
        image_size: int,
        *,
        allow_empty: bool = False,
        progress: Progress = lambda done, total: None,
    ) -> CachedPhotos:
        """Open the decoded `photos`, resized to squares of `image_size` pixels.

        Files that cannot be decoded are logged by name with the reason, and left out.

        Args:
            photos: in the desired order; an empty list gives an empty result.
            image_size: S, in pixels.
            allow_empty: return an empty result instead of raising if none of the photos is usable.
            progress: called with the number of photos done and the total.

        Raises:
            DataError: none of the photos is usable, or the cache folder cannot be written.
        """
        try:
            try:
                cached = self._open(photos, image_size, progress)
            except sqlite3.Error as error:
                if not cache_index.is_damage(error):
                    raise
                logger.warning("the index of the photo cache '%s' is damaged and made anew (%s)", self.root, error)
                cache_index.discard(self._index_path)
                cached = self._open(photos, image_size, progress)
        except (OSError, sqlite3.Error) as error:
            raise DataError(self._describe_error(error)) from error
        _report(cached.problems, len(photos))
        if photos and not cached.kept and not allow_empty:
            raise DataError(none_usable(cached.problems))
        return cached

    def digests(self, photos: Sequence[Photo]) -> dict[int, str]:
        """SHA-256 (hex) of the photos by position, without those that cannot be read.

        Only files that are new or changed are read.

        Raises:
            DataError: the cache folder cannot be written.
        """
        try:
            make_private_folder(self.root)
            with CacheIndex(self._index_path) as index:
                found, _ = _identify(photos, index)
        except sqlite3.Error as error:
            if not cache_index.is_damage(error):
                raise DataError(self._describe_error(error)) from error
            cache_index.discard(self._index_path)
            return self.digests(photos)
        except OSError as error:
            raise DataError(self._describe_error(error)) from error
        return {position: digest.hex() for position, digest in found.items()}

    def _open(self, photos: Sequence[Photo], image_size: int, progress: Progress) -> CachedPhotos:
        variant = f"v{DECODER_VERSION}-{image_size}px"
        make_private_folder(self.root / variant)
        with CacheIndex(self._index_path) as index:
            digests, problems = _identify(photos, index)
            contents = index.contents(digests.values(), variant)
            problems |= {i: contents[d].problem for i, d in digests.items() if d in contents and contents[d].problem}
            wanted = {i: digest for i, digest in digests.items() if i not in problems}
            images = self._open_pack(index, _pack_key(variant, wanted.values()), image_size)
            if images is None and wanted:
                builder = _Builder(cache=self, index=index, variant=variant, image_size=image_size, progress=progress)
                images, failed = builder.build(photos, wanted, contents)
                problems |= failed
        if images is None:
            images = np.empty((0, image_size, image_size, 3), np.uint8)
        return CachedPhotos(
            images=images,
            kept=tuple(i for i in range(len(photos)) if i not in problems),
            problems=tuple(Problem(path=photos[i].path, reason=problems[i]) for i in sorted(problems)),
        )

    def _open_pack(self, index: CacheIndex, key: str, image_size: int) -> NDArray[np.uint8] | None:
        """The pack; None if it is missing or damaged, and removed from the index."""
        checksum = index.checksum(key)
        if checksum is None:
            return None
        images = pack.open_pack(self.root / key, image_size, checksum)
        if images is None:
            logger.warning("cache file '%s' is missing or damaged: its photos are decoded again", self.root / key)
            index.forget_pack(key)
        else:
            index.touch(key)
        return images

    @property
    def _index_path(self) -> Path:
        return self.root / "index.sqlite"

    def _describe_error(self, error: OSError | sqlite3.Error) -> str:
        full = isinstance(error, OSError) and error.errno in _NO_SPACE
        elsewhere = "put the cache elsewhere (FEDSHELF_HOME)"
        if full or (isinstance(error, sqlite3.Error) and "full" in str(error)):
            return f"the photo cache '{self.root}' cannot grow, the disk is full: free space or {elsewhere}"
        return f"the photo cache '{self.root}' cannot be used ({reason(error)}): check its rights or {elsewhere}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Builder:
    """Writes one new pack: rows in existing packs are copied, the others decoded."""

    cache: PhotoCache
    index: CacheIndex
    variant: str
    image_size: int
    progress: Progress

    def build(
        self, photos: Sequence[Photo], wanted: dict[int, bytes], contents: dict[bytes, Content]
    ) -> tuple[NDArray[np.uint8] | None, dict[int, str]]:
        """Write and open the pack of the `wanted` photos (position to digest).

        Returns:
            The pack (None if no photo could be decoded), and by position the reasons of photos that could not.
        """
        self._remove_stale(len(wanted) * self.image_size**2 * 3)
        sources = {key: self.cache._open_pack(self.index, key, self.image_size) for key in _packs_of(contents)}
        positions = list(wanted)
        written: list[bytes] = []
        failed: dict[int, str] = {}
        undecodable: dict[bytes, str] = {}

        def row(position: int) -> NDArray[np.uint8]:
            content = contents.get(wanted[position])
            source = sources.get(content.pack) if content and content.pack else None
            if source is not None and content is not None:
                copied: NDArray[np.uint8] = source[content.row]
                return copied
            return decode(_read_unchanged(photos[position].path, wanted[position]), self.image_size)

        with pack.PackWriter(self.cache.root / self.variant) as writer, ThreadPoolExecutor(_THREADS) as pool:
            for start in range(0, len(positions), _CHUNK):
                chunk = positions[start : start + _CHUNK]
                for position, future in [(position, pool.submit(row, position)) for position in chunk]:
                    try:
                        writer.write(future.result())
                        written.append(wanted[position])
                    except (UnreadableFileError, MissingDecoderError) as error:  # may be gone the next time
                        failed[position] = str(error)
                    except UnusablePhotoError as error:
                        failed[position] = undecodable[wanted[position]] = str(error)
                self.progress(start + len(chunk), len(positions))
            key = _pack_key(self.variant, written)
            checksum = writer.publish(self.cache.root / key) if written else 0
        self.index.add_problems(undecodable.items(), self.variant)
        if not written:
            return None, failed
        self.index.add_pack(key, checksum, written, self.variant)
        return self._open_written(key), failed

    def _open_written(self, key: str) -> NDArray[np.uint8]:
        images = self.cache._open_pack(self.index, key, self.image_size)
        if images is None:
            raise OSError(errno.EIO, "a file just written does not read back", str(self.cache.root / key))
        return images

    def _remove_stale(self, num_bytes: int) -> None:
        """Remove leftovers of crashes, superseded packs, and those for which a pack of `num_bytes` leaves no space.

        Processes that have such a file mapped keep it.
        """
        pack.remove_leftovers(self.cache.root / self.variant)
        for key in self.index.superseded_packs(unused_since=time.time() - _KEEP_SUPERSEDED_SECONDS):
            self._remove(key)
        if self.cache.max_bytes is None:
            return
        if num_bytes > self.cache.max_bytes:
            raise PolicyError(
                f"decoded photos of {num_bytes / 1e6:,.0f} MB are more than max-cache-mb = "
                f"{self.cache.max_bytes / 1e6:,.0f}"
            )
        sizes = {path: path.stat().st_size for path in self.cache.root.glob(f"*/*{pack.SUFFIX}")}
        for key in self.index.packs_by_use():
            if sum(sizes.values()) + num_bytes <= self.cache.max_bytes:
                break
            self._remove(key)
            sizes.pop(self.cache.root / key, None)

    def _remove(self, key: str) -> None:
        (self.cache.root / key).unlink(missing_ok=True)
        self.index.forget_pack(key)


class UnreadableFileError(Exception):
    """The file cannot be read (its content is not the problem).

    The message is the reason. Internal to the package `data`.
    """


def _identify(photos: Sequence[Photo], index: CacheIndex) -> tuple[dict[int, bytes], dict[int, str]]:
    """The content digest of each photo by position, and the reasons of unreadable ones."""
    hashed_at_ns = time.time_ns()
    digests: dict[int, bytes] = {}
    problems: dict[int, str] = {}
    hashed: list[tuple[os.stat_result, bytes]] = []
    for i, photo in enumerate(photos):
        try:
            status = photo.path.stat()
            known = index.known_digest(status)
            if known is None:
                known = hashlib.sha256(read_photo(photo.path)).digest()
                hashed.append((status, known))
            digests[i] = known
        except OSError as error:
            problems[i] = f"the file cannot be read ({cause(error)})"
        except UnreadableFileError as error:
            problems[i] = str(error)
    if hashed:
        index.remember_digests(hashed, hashed_at_ns=hashed_at_ns)
    return digests, problems


def read_photo(path: Path) -> bytes:
    """Read all bytes of a photo file.

    Raises:
        UnreadableFileError: missing, not a regular file, not readable, or implausibly large.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableFileError("it is not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise UnreadableFileError(
                f"the file is too large: {status.st_size >> 20} MiB, at most {MAX_FILE_BYTES >> 20} MiB are read"
            )
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise UnreadableFileError(f"the file cannot be read ({cause(error)})") from error


def _read_unchanged(path: Path, digest: bytes) -> bytes:
    data = read_photo(path)
    if hashlib.sha256(data).digest() != digest:
        raise UnreadableFileError("the file was changed while it was being read; it counts from the next start on")
    return data


def _pack_key(variant: str, digests: Iterable[bytes]) -> str:
    """A pack's path below the cache folder."""
    return f"{variant}/{hashlib.sha256(b''.join(digests)).hexdigest()[:40]}{pack.SUFFIX}"


def _packs_of(contents: dict[bytes, Content]) -> set[str]:
    return {content.pack for content in contents.values() if content.pack}


def none_usable(problems: Sequence[Problem]) -> str:
    """The error message if all photos have problems."""
    reasons = Counter(problem.reason for problem in problems)
    listed = "; ".join(f"{reason} ({counted(count, 'photo')})" for reason, count in reasons.most_common(3))
    return f"none of its photos can be used: {listed}. 'fedshelf data check' names them"


def _report(problems: Sequence[Problem], num_photos: int) -> None:
    if not problems:
        return
    logger.warning("cannot be used and left out: %d of %s", len(problems), counted(num_photos, "photo"))
    for problem in problems[:_PROBLEMS_NAMED]:
        logger.warning("  '%s': %s", problem.path, problem.reason)
    if len(problems) > _PROBLEMS_NAMED:
        logger.warning("  and %d more; 'fedshelf data check' names them all", len(problems) - _PROBLEMS_NAMED)
