"""Uploads of the open round, kept until they are aggregated.

Two files per upload: `spool/ROUND-ATTEMPT/CLIENT.safetensors` is the message's body as received (moved here if it came
as a file), `CLIENT.json` its header. They are renamed into place but not fsynced: they live in the page cache, survive
the death of the process, and cost no disk time. A power cut may damage them, so files of an earlier process are hashed
once and compared with the header's digest; the client of a damaged one is asked again.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from fedshelf.core.errors import RefusedError, RunError
from fedshelf.core.messages import ClientMessage, TaskKey
from fedshelf.core.ports import Received
from fedshelf.core.system_errors import content_problem
from fedshelf.serialization import blob as blobs
from fedshelf.serialization import messages as payload
from fedshelf.storage.atomic_files import (
    make_own_folder,
    map_file,
    remove_leftovers,
    translating_os_errors,
    write_atomically,
)

logger = logging.getLogger(__name__)

_SUFFIX = ".safetensors"


class DamagedUploadError(Exception):
    """The files are not what was written. Internal to this module."""


class FileSpool:
    """Uploads as mapped files, so that the server's memory does not grow with the cohort.

    For one process and one thread.

    Args:
        directory: the spool's folder.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._found: dict[TaskKey, dict[str, Path]] = {}

    def put(self, key: TaskKey, client: str, message: ClientMessage, source: Received | None = None) -> None:
        """Store the upload, replacing an earlier one for the same key and client.

        Args:
            key: the task that it answers.
            client: the client that sent it.
            message: the upload.
            source: the file that holds its vectors, which is moved rather than copied.

        Raises:
            RunError: the disk is full, ...
        """
        found = self._files(key)
        make_own_folder(self._directory)
        path = make_own_folder(self._folder(key)) / file_name(client)
        if source is None:
            blob = payload.blob_of(message)
            write_atomically(path, blob.pieces, durable=False)
            digest = blob.digest if blob.pieces else ""
        else:
            with translating_os_errors("move", source.path):
                source.path.replace(path)
            digest = source.digest
        header = {"run_id": key.run_id, "client": client, "message": payload.encode_header(message, digest)}
        write_atomically(_header_path(path), json.dumps(header), durable=False)
        found[client] = path

    def names(self, key: TaskKey) -> Sequence[str]:
        """Names of the clients with an upload for `key`, sorted."""
        return sorted(self._files(key))

    def get(self, key: TaskKey, client: str) -> ClientMessage:
        """The upload. Its vectors are views of the file and stay valid after `clear`; do not write to them.

        Raises:
            KeyError: there is no upload.
            RefusedError: it can no longer be read; the round does without it.
        """
        path = self._files(key)[client]
        try:
            return cast(
                "ClientMessage", payload.Header.parse(_read_header(path)["message"]).message(blobs.read(map_file(path)))
            )
        except (RunError, DamagedUploadError, RefusedError) as error:
            logger.warning("the upload of client '%s' can no longer be read from '%s': %s", client, path, error)
            raise RefusedError(f"its upload can no longer be read from the server's disk: {error}") from error

    def clear(self) -> None:
        """Delete all uploads: the round has been aggregated and checkpointed, or is void."""
        self._found.clear()
        if self._directory.exists():
            with translating_os_errors("empty", self._directory):
                shutil.rmtree(self._directory)

    def _files(self, key: TaskKey) -> dict[str, Path]:
        """Files by client; those of an earlier process are looked up once."""
        if key not in self._found:
            self._found[key] = self._look_up(key)
        return self._found[key]

    def _look_up(self, key: TaskKey) -> dict[str, Path]:
        folder = self._folder(key)
        if not folder.is_dir():
            return {}
        remove_leftovers(folder)
        found = {}
        for path in sorted(folder.glob(f"*{_SUFFIX}")):
            try:
                header = _read_header(path)
                if blobs.digest(map_file(path)) != payload.Header.parse(header["message"]).blob:
                    raise DamagedUploadError("its digest differs")
                if header["run_id"] == key.run_id:
                    found[header["client"]] = path
            except (RunError, DamagedUploadError, RefusedError) as error:
                logger.warning("round %d: a received upload is lost, its client is asked again: %s", key.round, error)
                for part in (path, _header_path(path)):
                    part.unlink(missing_ok=True)
        return found

    def _folder(self, key: TaskKey) -> Path:
        return self._directory / f"{key.round:06d}-{key.attempt:03d}"


class MemorySpool:
    """Uploads in memory, for simulations, where they need not survive the process. Vectors are not copied."""

    def __init__(self) -> None:
        self._messages: dict[TaskKey, dict[str, ClientMessage]] = {}

    def put(self, key: TaskKey, client: str, message: ClientMessage, source: Received | None = None) -> None:
        self._messages.setdefault(key, {})[client] = message

    def names(self, key: TaskKey) -> Sequence[str]:
        return sorted(self._messages.get(key, ()))

    def get(self, key: TaskKey, client: str) -> ClientMessage:
        return self._messages[key][client]

    def clear(self) -> None:
        self._messages.clear()


def file_name(client: str) -> str:
    """A file name for any client name.

    It is readable where possible, unique by digest, and safe on every file system (no separators, case-insensitive,
    bounded length).
    """
    readable = re.sub(r"[^a-z0-9-]", "_", client.lower())[:40]
    digest = hashlib.sha256(client.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return f"{readable}-{digest}{_SUFFIX}"


def _header_path(blob: Path) -> Path:
    return blob.with_suffix(".json")


def _read_header(blob: Path) -> dict[str, str]:
    """The content of the header file: run id, client name and message header."""
    try:
        header = json.loads(_header_path(blob).read_text(encoding="utf-8"))
        return {name: str(header[name]) for name in ("run_id", "client", "message")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedUploadError(f"its header cannot be read: {content_problem(error)}") from error
