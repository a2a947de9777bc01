"""The state that simulated clients keep between rounds, in files of the run, so that any process can run any client.

A state is a file named by its task, `CLIENT/ROUND-ATTEMPT.safetensors`, written once and never modified. The current
one belongs to the client's newest upload that the server counted (`Broadcast.counted`), so no commit is needed: a state
that was not counted is never used again. Older states are kept while a run that resumes after a crash may need them:
its newest checkpoint may be one round older than its clients' states, and in asynchronous rounds a client may have
answered several times since.

Clients of a stateless algorithm have no files.
"""

import re
from pathlib import Path

from fedshelf.core.errors import RunError
from fedshelf.core.messages import Broadcast, ClientMessage, TaskKey
from fedshelf.core.state import ClientState
from fedshelf.core.system_errors import reason
from fedshelf.storage.atomic_files import make_own_folder, remove_leftovers, translating_os_errors
from fedshelf.storage.client_states import state_of, state_tensors
from fedshelf.storage.spool import file_name
from fedshelf.storage.tensor_files import DamagedFileError, read_tensors, write_tensors

_FILE = re.compile(r"(\d+)-(\d+)\.safetensors")


class SimulatedStates:
    """`ClientStates` of one simulated client. A simulated server never repeats a request, so uploads are not kept.

    Args:
        directory: folder of all clients of the run.
        client: the client's name.
    """

    def __init__(self, directory: Path, client: str) -> None:
        self._folder = directory / Path(file_name(client)).stem

    def commit_or_rollback(self, broadcast: Broadcast) -> ClientState:
        """Return the state after the client's newest counted upload, and delete files that are no longer needed.

        Raises:
            RunError: the state cannot be read.
        """
        if not self._folder.is_dir():
            return ClientState()
        remove_leftovers(self._folder)
        files, counted = self._files(), broadcast.counted
        now = None if counted is None else (counted.round, counted.attempt)
        chain = sorted(key for key in files if now is not None and key <= now)  # others were deleted at once
        old = [
            key for key in chain if key[0] <= broadcast.key.round - 2
        ]  # the newest may belong to a task that was still in flight
        kept = chain[max(0, len(old) - 2) :]
        for key, path in files.items():
            if key not in kept:
                with translating_os_errors("delete", path):
                    path.unlink(missing_ok=True)
        return _read(files[now]) if now in files else ClientState()

    def peek(self, key: TaskKey) -> ClientState:
        """Return the state after the answer to `key`, or else the newest before it.

        Raises:
            RunError: the state cannot be read.
        """
        files = self._files() if self._folder.is_dir() else {}
        known = sorted(found for found in files if found <= (key.round, key.attempt))
        return _read(files[known[-1]]) if known else ClientState()

    def cached_reply(self, key: TaskKey) -> ClientMessage | None:
        """Return None, because uploads are not kept."""
        return None

    def stage(self, key: TaskKey, upload: ClientMessage, state: ClientState) -> None:
        """Save the state after `upload`.

        Raises:
            RunError: the file cannot be written, for example on a full disk.
        """
        if state.is_empty and not self._folder.is_dir():
            return
        path = make_own_folder(self._folder) / f"{key.round:06d}-{key.attempt:03d}.safetensors"
        write_tensors(path, state_tensors(state), {}, durable=False)

    def _files(self) -> dict[tuple[int, int], Path]:
        with translating_os_errors("read", self._folder):
            found = [(_FILE.fullmatch(path.name), path) for path in self._folder.iterdir()]
        return {(int(match[1]), int(match[2])): path for match, path in found if match}


def _read(path: Path) -> ClientState:
    try:
        return state_of(read_tensors(path)[0])
    except (OSError, DamagedFileError) as error:
        raise RunError(
            f"the state of a simulated client is lost: {reason(error)}. Start the simulation as a new run (another "
            "--run-dir)."
        ) from error
