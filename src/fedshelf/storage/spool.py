"""Uploads of the open round, kept until they are folded.

Two files per upload: `spool/ROUND-ATTEMPT/CLIENT.safetensors` is the message's body as it came over the wire (moved
here where it came as a file), `CLIENT.json` its header. They are renamed into place but not fsynced: they live in the
page cache, survive the death of the process, and cost no disk time. A power cut may damage them; so what an earlier
process left is hashed once and compared with the header's digest, and the client of a damaged one is asked again.
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
from fedshelf.serialization import blob as blobs
from fedshelf.serialization import messages as payload
from fedshelf.storage.atomic_files import make_folder, map_file, remove_leftovers, saying_what_to_do, write_atomically

logger = logging.getLogger(__name__)

_SUFFIX = ".safetensors"


class DamagedUploadError(Exception):
    """The files are not what was written. Never leaves this module."""


class FileSpool:
    """Uploads as mapped files: the server's memory does not grow with the cohort. One process, one thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._found: dict[TaskKey, dict[str, Path]] = {}

    def put(self, key: TaskKey, client: str, message: ClientMessage, source: Received | None = None) -> None:
        """Keep the upload; a second one for the same key and client replaces the first.

        Args:
            key: the task that it answers.
            client: who sent it.
            message: the upload.
            source: the file that its vectors came in: it is moved, not copied.

        Raises:
            RunError: the disk is full, ...
        """
        found = self._files(key)
        path = make_folder(self._folder(key)) / file_name(client)
        if source is None:
            blob = payload.blob_of(message)
            write_atomically(path, blob.pieces, durable=False)
            digest = blob.digest if blob.pieces else ""
        else:
            with saying_what_to_do("move", source.path):
                source.path.replace(path)
            digest = source.digest
        told = {"run_id": key.run_id, "client": client, "message": payload.encode_header(message, digest)}
        write_atomically(_header_path(path), json.dumps(told), durable=False)
        found[client] = path

    def names(self, key: TaskKey) -> Sequence[str]:
        """Clients with an upload for `key`, sorted."""
        return sorted(self._files(key))

    def get(self, key: TaskKey, client: str) -> ClientMessage:
        """The upload. Its vectors are views of the file and stay valid after `clear`; do not write to them.

        Raises:
            KeyError: there is none.
            RunError: somebody has changed the file.
        """
        path = self._files(key)[client]
        try:
            return cast(
                "ClientMessage", payload.Header.parse(_told(path)["message"]).message(blobs.read(map_file(path)))
            )
        except (RunError, DamagedUploadError, RefusedError) as error:
            raise RunError(
                f"the upload of client '{client}' for round {key.round} can no longer be read from '{path}': {error}. "
                f"Keep other programs out of that folder, and start the server again: it goes on with this round."
            ) from error

    def clear(self) -> None:
        """Forget everything: the round has been folded and checkpointed, or is void."""
        self._found.clear()
        if self._directory.exists():
            with saying_what_to_do("empty", self._directory):
                shutil.rmtree(self._directory)

    def _files(self, key: TaskKey) -> dict[str, Path]:
        """By client's name; what an earlier process left is looked up once."""
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
                told = _told(path)
                if blobs.digest(map_file(path)) != payload.Header.parse(told["message"]).blob:
                    raise DamagedUploadError("its digest differs")
                if told["run_id"] == key.run_id:
                    found[told["client"]] = path
            except (RunError, DamagedUploadError, RefusedError) as error:
                logger.warning("round %d: a received upload is lost, its client is asked again: %s", key.round, error)
                for part in (path, _header_path(path)):
                    part.unlink(missing_ok=True)
        return found

    def _folder(self, key: TaskKey) -> Path:
        return self._directory / f"{key.round:06d}-{key.attempt:03d}"


class MemorySpool:
    """Uploads in memory, for a simulation: they need not survive the process. The vectors are kept as they are."""

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
    """A file's name for any client's name: readable where it can be, unique by digest, safe on every file system
    (no separators, no case, bounded length)."""
    readable = re.sub(r"[^a-z0-9-]", "_", client.lower())[:40]
    digest = hashlib.sha256(client.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return f"{readable}-{digest}{_SUFFIX}"


def _header_path(blob: Path) -> Path:
    return blob.with_suffix(".json")


def _told(blob: Path) -> dict[str, str]:
    """What the header's file says: the run's id, the client's name, and the message's header."""
    try:
        told = json.loads(_header_path(blob).read_text(encoding="utf-8"))
        return {name: str(told[name]) for name in ("run_id", "client", "message")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedUploadError(f"its header cannot be read: {error!r}") from error
