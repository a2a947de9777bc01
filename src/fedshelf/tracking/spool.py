"""Uploads of the open round, kept until they are folded.

One file per upload, `spool/ROUND-ATTEMPT/CLIENT.safetensors`, renamed into place but not fsynced: it lives in the page
cache, survives the death of the process, and costs no disk time. A power cut may damage it; so what an earlier process
left is checked once, and the client of a damaged one is simply asked again.
"""

import hashlib
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from fedshelf.core.errors import RefusedError, RunError
from fedshelf.core.messages import ClientMessage, TaskKey
from fedshelf.tracking import message_file
from fedshelf.tracking.files import make_folder, remove_leftovers, saying_what_to_do
from fedshelf.tracking.tensor_file import DamagedFileError, read_tensors, write_tensors

logger = logging.getLogger(__name__)

_SUFFIX = ".safetensors"


class FileSpool:
    """Uploads as mapped files: the server's memory does not grow with the cohort. One process, one thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._found: dict[TaskKey, dict[str, Path]] = {}

    def put(self, key: TaskKey, client: str, message: ClientMessage) -> None:
        """Keep the upload; a second one for the same key and client replaces the first.

        Raises:
            RunError: the disk is full, ...
        """
        found = self._files(key)
        path = make_folder(self._folder(key)) / file_name(client)
        vectors, header = message_file.split(message)
        info = {"run_id": key.run_id, "client": client, "message": header}
        write_tensors(path, vectors, info, durable=False)
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
            vectors, info = read_tensors(path, verify=False)
            return message_file.join(vectors, info["message"])
        except (OSError, DamagedFileError, RefusedError, KeyError, TypeError, ValueError) as error:
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
                _, info = read_tensors(path)
                if info["run_id"] == key.run_id:
                    found[info["client"]] = path
            except (OSError, DamagedFileError, KeyError, TypeError) as error:
                logger.warning("round %d: a received upload is lost, its client is asked again: %s", key.round, error)
                path.unlink(missing_ok=True)
        return found

    def _folder(self, key: TaskKey) -> Path:
        return self._directory / f"{key.round:06d}-{key.attempt:03d}"


class MemorySpool:
    """Uploads in memory, for a simulation: they need not survive the process. The vectors are kept as they are."""

    def __init__(self) -> None:
        self._messages: dict[TaskKey, dict[str, ClientMessage]] = {}

    def put(self, key: TaskKey, client: str, message: ClientMessage) -> None:
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
