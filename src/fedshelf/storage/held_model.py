"""The model that a client decoded last, stored as the base of the next difference."""

import logging
from pathlib import Path

from torch import Tensor

from fedshelf.core.system_errors import reason
from fedshelf.storage.tensor_files import DamagedFileError, read_tensors, write_tensors

logger = logging.getLogger(__name__)

_MODEL = "model"


class FileHeldModel:
    """Holds the model in memory, and in a file for the next process. For one process and one thread.

    The file is renamed into place but not fsynced: after a power cut, the client receives the full model again.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: tuple[str, Tensor] | None = None
        self._looked = False

    def load(self) -> tuple[str, Tensor] | None:
        """The model's name and values [S]; None if there is none or the file is damaged."""
        if not self._looked and self._held is None:
            self._looked = True
            try:
                tensors, info = read_tensors(self._path)
                self._held = (str(info["name"]), tensors[_MODEL].clone())
            except FileNotFoundError:
                return None
            except (OSError, DamagedFileError, KeyError, TypeError) as error:
                logger.warning("the model held from before is lost, the server sends it whole: %s", reason(error))
        return self._held

    def save(self, name: str, model: Tensor) -> None:
        """Store `model` [S] under `name`.

        Raises:
            RunError: the disk is full, ...
        """
        self._held = (name, model)
        write_tensors(self._path, {_MODEL: model}, {"name": name}, durable=False)
