"""The server's state on disk: one file per round; the newest few and the best are kept."""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fedshelf.core.errors import RunError
from fedshelf.core.messages import TaskKey
from fedshelf.core.state import SCHEMA_VERSION, Best, InFlight, ModelState, OpenRound, ServerState, Suspension
from fedshelf.core.system_errors import content_problem
from fedshelf.storage.atomic_files import (
    make_own_folder,
    remove_leftovers,
    translating_os_errors,
    write_atomically,
)
from fedshelf.storage.tensor_files import DamagedFileError, read_tensors, write_tensors

logger = logging.getLogger(__name__)

_PARAMS = "params"
_SENT = "sent"
_MEAN = "mean"
_OPTIMIZER = "optimizer."
_FILE = re.compile(r"round-(\d+)\.safetensors")
_KEY_FIELDS = ("run_id", "round", "attempt")


class FileCheckpoints:
    """Checkpoints as `round-NNNNNN.safetensors` and `open_round.json`. Only for the process that owns the run.

    Args:
        directory: created if missing.
        keep: number of newest checkpoints to keep, at least 1; with 1, a damaged newest checkpoint ends the run. The
            best one, and those that tasks in flight started from, are kept in addition.
    """

    def __init__(self, directory: Path, *, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}: at least one checkpoint must be kept")
        self._directory = make_own_folder(directory)
        self._keep = keep
        remove_leftovers(directory)

    def load(self) -> ServerState | None:
        """The newest readable state, or None in a new run. Damaged files are skipped with a warning.

        Raises:
            RunError: no checkpoint is readable, or they were written by a newer FedShelf.
        """
        problems = []
        for path in reversed(self._files().values()):
            try:
                return _read(path)
            except DamagedFileError as error:
                logger.warning("checkpoint skipped, the run resumes from the one before: %s", error)
                problems.append(str(error))
        if problems:
            raise RunError(
                f"no checkpoint in '{self._directory}' can be read: {'; '.join(problems)}. "
                f"Restore the folder from a copy, or start a new run with another --run-dir."
            )
        return None

    def load_round(self, round: int) -> ServerState | None:
        """The state after `round`; None if it is no longer kept or not readable (with a warning)."""
        path = self._files().get(round)
        if path is None:
            return None
        try:
            return _read(path)
        except DamagedFileError as error:
            logger.warning("the state after round %d is lost: %s", round, error)
            return None

    def save(self, state: ServerState, *, is_best: bool, alone: bool = False) -> None:
        """Write the state and delete old ones.

        Args:
            state: the state.
            is_best: whether this is the best round so far.
            alone: whether to delete all earlier ones, which hold what is to be forgotten.

        Raises:
            RunError: the disk is full, ...; earlier checkpoints are unaffected.
        """
        best_round = state.round if is_best else state.best.round if state.best else None
        model = state.model
        kept = {_PARAMS: model.params, _SENT: model.sent, _MEAN: model.mean}
        tensors = {name: tensor for name, tensor in kept.items() if tensor is not None}
        tensors |= {_OPTIMIZER + name: v for name, v in model.optimizer.items()}
        write_tensors(self._path(state.round), tensors, _info(state, best_round))
        files = self._files()
        needed = {best_round, *(flight.key.round - 1 for flight in state.in_flight if flight.wanted)}
        for round_ in list(files)[: -1 if alone else -self._keep]:
            if round_ not in needed:
                with translating_os_errors("delete", files[round_]):
                    files[round_].unlink(missing_ok=True)

    def load_open_round(self) -> OpenRound | None:
        """The open round, or None.

        Raises:
            RunError: it was written by a newer FedShelf.
        """
        path = self._directory / "open_round.json"
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            check_schema(fields["schema"], path)
            cohort = tuple(fields["cohort"])
            return OpenRound(
                key=_task_key(fields["key"]), cohort=cohort, live=tuple(fields.get("live", cohort)),
                wanted=fields.get("wanted"), num_steps=dict(fields.get("num_steps", {})),
                pace=dict(fields.get("pace", {})),
                noise_key=bytes.fromhex(fields["noise_key"]) if fields.get("noise_key") else None,
                masking=fields.get("masking", ""), encryption=fields.get("encryption", ""),
                classes=fields.get("classes", ""),
            )  # fmt: skip
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            # Harmless: the round restarts, and clients that have replied send the same bytes again.
            logger.warning("'%s' cannot be read, the round starts over: %s", path, content_problem(error))
            return None

    def save_open_round(self, open_round: OpenRound) -> None:
        """Replace the open round.

        Raises:
            RunError: see `save`.
        """
        fields = {
            "schema": SCHEMA_VERSION,
            "key": _as_list(open_round.key),
            "cohort": list(open_round.cohort),
            "live": list(open_round.live),
            "wanted": open_round.wanted,
            "num_steps": dict(open_round.num_steps),
            "pace": dict(open_round.pace),
            "noise_key": open_round.noise_key.hex() if open_round.noise_key else None,
            "masking": open_round.masking,
            "encryption": open_round.encryption,
            "classes": open_round.classes,
        }
        write_atomically(self._directory / "open_round.json", json.dumps(fields))

    def forget_noise_key(self) -> None:
        """Replace the open round by one without the key of its noise.

        Raises:
            RunError: see `save`.
        """
        opened = self.load_open_round()
        if opened is not None:
            self.save_open_round(replace(opened, noise_key=None))

    def _path(self, round: int) -> Path:
        return self._directory / f"round-{round:06d}.safetensors"

    def _files(self) -> dict[int, Path]:
        """Files by round, oldest first."""
        found = {int(m[1]): path for path in self._directory.iterdir() if (m := _FILE.fullmatch(path.name))}
        return dict(sorted(found.items()))


def _info(state: ServerState, best_round: int | None) -> dict[str, Any]:
    return {
        "schema": SCHEMA_VERSION,
        "round": state.round,
        "counted": {client: _as_list(key) for client, key in state.counted.items()},
        "times_live": dict(state.times_live),
        "best": None if state.best is None else [state.best.round, state.best.value, state.best.metric],
        "best_round": best_round,
        "void_rounds": state.void_rounds,
        "pace": dict(state.pace),
        "evaluated": {client: list(score) for client, score in state.evaluated.items()},
        "virtual_seconds": state.virtual_seconds,
        "in_flight": [
            [flight.client, _as_list(flight.key), flight.due, flight.leaves, flight.wanted]
            for flight in state.in_flight
        ],
        "compared": state.compared,
        "refits": list(state.refits),
        "classes": state.classes,
        "photos": dict(state.photos),
        "clip_norm": state.clip_norm,
        "suspended": {client: [found.last_round, found.reason] for client, found in state.suspended.items()},
    }


def _read(path: Path) -> ServerState:
    try:
        tensors, info = read_tensors(path)
        check_schema(info["schema"], path)
        # Copy: the file may be deleted, and a reader may write to the tensors.
        return _state({name: tensor.clone() for name, tensor in tensors.items()}, info)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{path.name} cannot be read: {content_problem(error)}") from error


def _state(tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> ServerState:
    best = info["best"]
    return ServerState(
        round=info["round"],
        model=ModelState(
            params=tensors[_PARAMS],
            sent=tensors.get(_SENT),
            mean=tensors.get(_MEAN),
            optimizer={n.removeprefix(_OPTIMIZER): v for n, v in tensors.items() if n.startswith(_OPTIMIZER)},
        ),
        counted={client: _task_key(key) for client, key in info["counted"].items()},
        times_live=dict(info.get("times_live", {})),
        best=None if best is None else Best(round=best[0], value=best[1], metric=best[2]),
        void_rounds=info["void_rounds"],
        pace=dict(info.get("pace", {})),
        evaluated={client: (score[0], score[1]) for client, score in info.get("evaluated", {}).items()},
        virtual_seconds=info.get("virtual_seconds", 0.0),
        in_flight=tuple(
            InFlight(client=client, key=_task_key(key), due=due, leaves=leaves, wanted=wanted)
            for client, key, due, leaves, wanted in info.get("in_flight", ())
        ),
        compared=info.get("compared", 0),
        refits=tuple(info.get("refits", ())),
        classes=info.get("classes", ""),
        photos=dict(info.get("photos", {})),
        clip_norm=info.get("clip_norm"),
        suspended={
            client: Suspension(last_round=last_round, reason=reason)
            for client, (last_round, reason) in info.get("suspended", {}).items()
        },
    )


def check_schema(schema: int, path: Path) -> None:
    """Check that the schema version is supported.

    Args:
        schema: version in the file.
        path: the file.

    Raises:
        RunError: the version is older or newer.
    """
    if schema > SCHEMA_VERSION:
        raise RunError(
            f"'{path}' was written by a newer FedShelf (schema {schema}, this one reads {SCHEMA_VERSION}). "
            "Resume with that version, or a newer one."
        )
    if schema < SCHEMA_VERSION:
        raise RunError(
            f"'{path}' was written by an older FedShelf (schema {schema}, this one reads {SCHEMA_VERSION}), and cannot "
            "be resumed. Resume with that version, or start a new run with another --run-dir; 'fedshelf runs show' "
            "and 'fedshelf predict' still read this one."
        )


def _as_list(key: TaskKey) -> list[str | int]:
    return [key.run_id, key.round, key.attempt]


def _task_key(fields: list[Any]) -> TaskKey:
    return TaskKey(**dict(zip(_KEY_FIELDS, fields, strict=True)))
