"""The state that a client keeps between rounds, committed in two phases.

On disk, per run: `committed` is the current state; `pending` holds the last reply and the state that follows it, in one
file. A broadcast decides about the pending part (`Broadcast.counted` is the last upload that the server counted):

    counted == pending key              commit: write `committed`, then delete `pending`
    else key == pending key             a restarted server asks again: keep both, reply with the same bytes
    else                                roll back: delete `pending`

Every step is one rename or one unlink. A crash between the two steps of a commit repeats the first one, which copies a
whole state and is therefore idempotent.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fedshelf.core.errors import RefusedError, RunError
from fedshelf.core.messages import Broadcast, ClientMessage, TaskKey
from fedshelf.core.state import SCHEMA_VERSION, ClientState
from fedshelf.core.system_errors import content_problem
from fedshelf.serialization import messages as payload
from fedshelf.storage.atomic_files import make_own_folder, remove_leftovers, translating_os_errors
from fedshelf.storage.checkpoints import check_schema
from fedshelf.storage.spool import file_name
from fedshelf.storage.tensor_files import DamagedFileError, read_tensors, write_tensors

logger = logging.getLogger(__name__)

_SLOTS = ("algorithm", "personalization", "pipeline")
_UPLOAD = "upload/"
_NUM_CLASSES = "num_classes"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Kept:
    """The content of one file.

    Attributes:
        key: the task.
        state: the state that follows it.
        upload: the reply; None in a committed state, and where that of an old run was dropped.
    """

    key: TaskKey
    state: ClientState
    upload: ClientMessage | None = None


class FileClientStates:
    """States in files below `directory`, one folder per run. For one process and one thread.

    Args:
        directory: the client's own folder; created if missing.
        has_left: whether the reply to a task has begun to leave this machine. One that has not is forgotten, with the
            state that follows it: a server could claim that it was counted.
    """

    def __init__(self, directory: Path, *, has_left: Callable[[TaskKey], bool] = lambda key: True) -> None:
        self._directory = make_own_folder(directory)
        for folder in self._runs():
            remove_leftovers(folder)
            pending = self._pending(folder)
            if pending is not None and not has_left(pending.key):
                _delete(_pending_path(folder))

    def commit_or_rollback(self, broadcast: Broadcast) -> ClientState:
        """Commit the pending state if the server counted it, otherwise roll it back; return the current state.

        Raises:
            RunError: the disk is full, ..., or the committed state is damaged or was written by a newer FedShelf.
        """
        folder = self._folder(broadcast.key)
        pending = self._pending(folder)
        committed = self._committed(folder)
        if pending is not None and pending.key == broadcast.counted:
            if not pending.state.is_empty or committed is not None:  # a stateless algorithm has nothing to write
                _write(_committed_path(folder), _Kept(key=pending.key, state=pending.state))
            _delete(_pending_path(folder))
            return pending.state
        if pending is not None and pending.key != broadcast.key:
            _delete(_pending_path(folder))
        return ClientState() if committed is None else committed.state

    def peek(self, key: TaskKey) -> ClientState:
        """The state that follows the reply to `key`, whether committed or not; otherwise the current state.

        Raises:
            RunError: the committed state is damaged or was written by a newer FedShelf.
        """
        folder = self._folder(key)
        pending = self._pending(folder)
        if pending is not None and pending.key == key:
            return pending.state
        committed = self._committed(folder)
        return ClientState() if committed is None else committed.state

    def cached_reply(self, key: TaskKey) -> ClientMessage | None:
        """The stored reply for `key`, to be sent again byte for byte; None if there is none.

        Its vectors are views of a file and must not be written to.
        """
        pending = self._pending(self._folder(key))
        return pending.upload if pending is not None and pending.key == key else None

    def stage(self, key: TaskKey, upload: ClientMessage, state: ClientState) -> None:
        """Store the reply and the state that follows it, both pending. Call this before sending the reply.

        Args:
            key: the task.
            upload: the reply.
            state: the state that follows it.

        Raises:
            RunError: the disk is full, ...
        """
        folder = self._folder(key)
        for other in self._runs():
            if other != folder:
                _drop_upload(other)
        make_own_folder(folder)
        _write(_pending_path(folder), _Kept(key=key, state=state, upload=upload))

    def _pending(self, folder: Path) -> _Kept | None:
        try:
            return _read(_pending_path(folder))
        except DamagedFileError as error:
            # Only a power cut causes this, and only for a stateless algorithm (see `_write`), where training again
            # gives the same result.
            logger.warning("the last answer is lost and will be made again if it is asked for: %s", error)
            _delete(_pending_path(folder))
            return None

    def _committed(self, folder: Path) -> _Kept | None:
        path = _committed_path(folder)
        try:
            return _read(path)
        except DamagedFileError as error:
            raise RunError(
                f"the client's state is lost: {error}. Restore '{path}' from a copy, or delete it: the client then "
                f"continues as a new one."
            ) from error

    def _folder(self, key: TaskKey) -> Path:
        return self._directory / Path(file_name(key.run_id)).stem

    def _runs(self) -> list[Path]:
        return sorted(path for path in self._directory.iterdir() if path.is_dir())


def _committed_path(folder: Path) -> Path:
    return folder / "committed.safetensors"


def _pending_path(folder: Path) -> Path:
    return folder / "pending.safetensors"


def _drop_upload(folder: Path) -> None:
    """Delete an old run's reply to save disk space. Its state may still be committed."""
    path = _pending_path(folder)
    try:
        pending = _read(path)
    except DamagedFileError:
        return _delete(path)
    if pending is None or pending.upload is None:
        return None
    return _write(path, _Kept(key=pending.key, state=pending.state)) if not pending.state.is_empty else _delete(path)


def _write(path: Path, kept: _Kept) -> None:
    """Write a file, fsynced unless it is a reply without a state: after a power cut, training again restores that."""
    tensors = state_tensors(kept.state)
    info: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "key": [kept.key.run_id, kept.key.round, kept.key.attempt],
        "message": None,
    }
    if kept.upload is not None:
        vectors, info["message"] = payload.vectors_of(kept.upload), payload.encode_header(kept.upload, "")
        tensors |= {_UPLOAD + name: vector for name, vector in vectors.items()}
    write_tensors(path, tensors, info, durable=kept.upload is None or not kept.state.is_empty)


def _read(path: Path) -> _Kept | None:
    try:
        tensors, info = read_tensors(path)
        check_schema(info["schema"], path)
        run_id, round_, attempt = info["key"]
        header = info["message"]
        return _Kept(
            key=TaskKey(run_id=run_id, round=round_, attempt=attempt),
            state=state_of(tensors),
            upload=None
            if header is None
            else cast("ClientMessage", payload.Header.parse(header).message(_below(_UPLOAD, tensors))),
        )
    except FileNotFoundError:
        return None
    except (OSError, DamagedFileError, RefusedError, KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"'{path}' cannot be read: {content_problem(error)}") from error


def state_tensors(state: ClientState) -> dict[str, Tensor]:
    """The tensors of all slots, by `SLOT/NAME`, and the number of classes, if it is known."""
    found = {f"{slot}/{name}": tensor for slot in _SLOTS for name, tensor in getattr(state, slot).items()}
    return {**found, _NUM_CLASSES: torch.tensor([state.num_classes])} if found and state.num_classes else found


def state_of(tensors: Mapping[str, Tensor]) -> ClientState:
    """Invert `state_tensors`, ignoring other tensors."""
    slots: dict[str, Any] = {slot: _below(f"{slot}/", tensors) for slot in _SLOTS}
    return ClientState(**slots, num_classes=int(tensors[_NUM_CLASSES][0]) if _NUM_CLASSES in tensors else 0)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _delete(path: Path) -> None:
    with translating_os_errors("delete", path):
        path.unlink(missing_ok=True)
