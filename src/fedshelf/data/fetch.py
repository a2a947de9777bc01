"""`fedshelf data fetch`: download a public photo set.

The archive is the repository's zip of one fixed commit. The host repacks such archives from time to time, so their
checksum is not fixed, but the files are. Unless the caller gives a checksum of the archive, the files are therefore
verified. Unverified files never get their final name.
"""

import errno
import hashlib
import http.client
import json
import os
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from fedshelf.core.errors import DataError, TransportError, UsageError
from fedshelf.core.system_errors import reason
from fedshelf.data.filesystem import whole_folder
from fedshelf.storage.atomic_files import open_private

_ATTEMPTS = 5
_TIMEOUT_SECONDS = 60
_BLOCK = 1 << 18
_MAX_TOTAL_BYTES = 8 << 30
_DISK_ERRORS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EISDIR, errno.ELOOP)
)

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PublicSet:
    """A photo set in a public git repository.

    Attributes:
        repository: OWNER/REPO.
        commit: the commit id.
        files_sha256: checksum of all files of the commit: SHA-256 over lines `SHA256  PATH`, sorted by path.
        photos: the folder that holds the photos.
        citation: how to cite the set.
    """

    repository: str
    commit: str
    files_sha256: str
    photos: str
    citation: str


GROCERIES = PublicSet(
    repository="marcusklasson/GroceryStoreDataset",
    commit="fc80ba90f803d79d0383df52c5a4ac5de99ff6fc",
    files_sha256="c285543bc0e04fec57168cfa4d745fe644e4a8db78a8bb32c338274d2c59fc47",
    photos="dataset",
    citation="Klasson, Zhang, Kjellström, 'A Hierarchical Grocery Store Image Dataset with Visual and Semantic "
    "Labels', WACV 2019, arXiv:1901.00711; MIT license",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """A downloaded photo set.

    Attributes:
        photos: the folder that holds the photos.
        sha256: the archive's SHA-256, to pin it in later downloads.
        proof: what the files were verified against.
    """

    photos: Path
    sha256: str
    proof: str


def fetch(
    source: PublicSet,
    out: Path,
    *,
    sha256: str | None = None,
    base_url: str | None = None,
    retry_seconds: float = 2.0,
    progress: Progress = lambda done, total: None,
) -> Fetched:
    """Download, verify and unpack `source` into `out`.

    An interrupted download is kept as `<out>.zip.part` and resumed, by this call and later ones.

    Args:
        source: the set to download.
        out: created; must be missing or empty.
        sha256: expected checksum of the archive (hex); if given, it is verified instead of the files.
        base_url: a mirror that serves `/OWNER/REPO/zip/COMMIT` instead of GitHub.
        retry_seconds: delay before the second attempt, doubled before each later one.
        progress: called with the bytes done and the total (None if the server does not report it).

    Raises:
        TransportError: the server cannot be reached, does not have the archive, or broke off too often.
        DataError: the files do not match (nothing is kept), or `out` cannot be written.
        UsageError: `base_url` is not a web address, or `sha256` is not a checksum.
    """
    _check(base_url, sha256)
    part = out.with_name(out.name + ".zip.part")
    with whole_folder(out) as work:
        url = f"{base_url or 'https://codeload.github.com'}/{source.repository}/zip/{source.commit}"
        download(url, part, retry_seconds=retry_seconds, progress=progress)
        actual = _sha256(part)
        try:
            if sha256 is not None and actual != sha256.lower():
                raise DataError(f"the archive from '{url}' has SHA-256 {actual}, not {sha256}: nothing of it is kept")
            if unpack(part, work) != source.files_sha256 and sha256 is None:
                raise DataError(f"the files from '{url}' are not those of commit {source.commit}: refused")
        except DataError:
            _discard(part)
            raise
    _discard(part)
    proof = f"git commit {source.commit}" if sha256 is None else f"SHA-256 {actual}"
    return Fetched(photos=out / source.photos, sha256=actual, proof=proof)


def _check(base_url: str | None, sha256: str | None) -> None:
    if base_url is not None:
        try:
            parts = urlsplit(base_url)
            is_web = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        except ValueError:  # brackets, or a port that is not a number
            is_web = False
        if not is_web:
            raise UsageError(f"'{base_url}' is not a web address: it must start with https:// or http://, and a host")
    if sha256 is not None and (len(sha256) != 64 or not set(sha256.lower()) <= set("0123456789abcdef")):
        raise UsageError(f"'{sha256}' is not a SHA-256 checksum: give 64 hexadecimal digits")


def download(url: str, part: Path, *, retry_seconds: float, progress: Progress) -> None:
    """Download `url` to `part`, resuming an earlier attempt if the server supports it and the file is unchanged.

    Args:
        url: the file.
        part: where it is stored.
        retry_seconds: delay before the second attempt, doubled before each later one.
        progress: called with the bytes done and the total.

    Raises:
        TransportError: see `fetch`; received data stays in `part`.
    """
    trouble = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(retry_seconds * 2 ** (attempt - 1))
        try:
            if _download_once(url, part, progress):
                return
            trouble = "the connection broke off"
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500:
                raise TransportError(
                    f"'{url}' cannot be had: the server answers {error.code} {error.reason}"
                ) from error
            trouble = f"the server answers {error.code} {error.reason}"
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: from a host's or proxy's URL
            if getattr(error, "errno", None) in _DISK_ERRORS:
                raise DataError(f"'{part}' cannot be written: {error}") from error
            trouble = reason(error)
    kept = part.stat().st_size if part.exists() else 0
    raise TransportError(
        f"'{url}' could not be downloaded in {_ATTEMPTS} attempts ({trouble}). Is there internet? "
        f"{kept >> 20} MiB have arrived and are kept: the same command continues from there"
    )


def unpack(archive: Path, into: Path) -> str:
    """Unpack a zip of a git commit without its top folder, and return the checksum of its files (see `PublicSet`).

    Raises:
        DataError: not a zip file, damaged, or with an unsafe entry (a link, a path outside of the folder, more than
            8 GiB).
    """
    try:
        with zipfile.ZipFile(archive) as content:
            entries = [entry for entry in content.infolist() if not entry.is_dir()]
            if sum(entry.file_size for entry in entries) > _MAX_TOTAL_BYTES:
                raise DataError("the archive would unpack to more than 8 GiB: refused")
            files = {}
            for entry in entries:
                path = _safe_path(entry)
                target = into / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with content.open(entry) as packed, target.open("xb") as file:
                    while block := packed.read(_BLOCK):
                        file.write(block)
                files[path.as_posix()] = _sha256(target)
    except (
        zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, FileExistsError, ValueError
    ) as error:  # fmt: skip
        raise DataError(f"the archive is damaged ({error}): nothing of it is kept; run the command again") from error
    return hashlib.sha256("".join(f"{files[path]}  {path}\n" for path in sorted(files)).encode()).hexdigest()


def _download_once(url: str, part: Path, progress: Progress) -> bool:
    """Make one request; return whether the file is complete."""
    note = part.with_name(part.name + ".json")
    start = part.stat().st_size if part.exists() else 0
    try:
        known = json.loads(note.read_text()) if start and note.exists() else {}
        if known and start == known["total"]:
            return True
        tag = known.get("etag")
    except (ValueError, KeyError, AttributeError):  # a crash damaged the note: download the file again
        tag = None
    request = urllib.request.Request(url)  # noqa: S310  the caller has checked the scheme
    if start and tag:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", tag)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        error.close()  # the file has changed and is shorter now: restart
        _discard(part)
        return False
    with response:
        goes_on = response.status == http.HTTPStatus.PARTIAL_CONTENT
        length = response.headers.get("Content-Length")
        done = start if goes_on else 0
        total = done + int(length) if length is not None else None
        create = os.O_WRONLY | os.O_CREAT
        with os.fdopen(open_private(note, create | os.O_TRUNC), "w") as text:
            json.dump({"etag": response.headers.get("ETag"), "total": total}, text)
        with os.fdopen(open_private(part, create | (os.O_APPEND if goes_on else os.O_TRUNC)), "wb") as file:
            while block := response.read1(_BLOCK):
                file.write(block)
                done += len(block)
                progress(done, total)
    return total is None or done == total


def _safe_path(entry: zipfile.ZipInfo) -> PurePosixPath:
    """The path of an entry, below the archive's one top folder."""
    parts = entry.filename.split("/")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if len(parts) < 2 or not {"", ".", ".."}.isdisjoint(parts) or "\\" in entry.filename:
        raise DataError(f"the archive holds the path '{entry.filename}', which leads out of its folder: refused")
    if kind not in {0, stat.S_IFREG}:
        raise DataError(f"the archive's '{entry.filename}' is not an ordinary file: refused")
    return PurePosixPath(*parts[1:])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_name(part.name + ".json").unlink(missing_ok=True)
