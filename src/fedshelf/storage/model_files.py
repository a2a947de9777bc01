"""A trained model as three files: weights, class names, and a card that says what they are.

The card is written last and carries the digests of the other two, so that a set that does not belong together is found
out when it is loaded.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from fedshelf.core.errors import ModelError
from fedshelf.serialization import records
from fedshelf.serialization.tensor_file import tensor_chunks
from fedshelf.storage.atomic_files import make_folder, write_together

WEIGHTS = "model.safetensors"
LABELS = "labels.json"
CARD = "model_card.json"
_DIGESTS = "sha256"


def save_model(
    directory: Path, state_dict: Mapping[str, Tensor], labels: Sequence[str], card: Mapping[str, Any]
) -> None:
    """Replace the model in `directory`, all three files together.

    Args:
        state_dict: the module's tensors by name, as `load_state_dict` takes them.
        labels: the class names; index i is output i.
        card: what the model is, JSON values; `sha256` is added.

    Raises:
        RunError: the disk is full, ...; the model that was there is whole.
    """
    make_folder(directory)
    weights = b"".join(tensor_chunks(state_dict, {}))
    names = records.dump(list(labels), indent=1).encode() + b"\n"
    digests = {WEIGHTS: hashlib.sha256(weights).hexdigest(), LABELS: hashlib.sha256(names).hexdigest()}
    text = records.dump({**card, _DIGESTS: digests}, indent=1) + "\n"
    write_together({directory / WEIGHTS: weights, directory / LABELS: names, directory / CARD: text})


def load_model_files(directory: Path) -> tuple[dict[str, Tensor], list[str], dict[str, Any]]:
    """The state dict, the class names and the card that `save_model` wrote.

    Raises:
        ModelError: a file is missing, damaged, or not of the same model as the others.
    """
    weights, names, text = (_read(directory / name) for name in (WEIGHTS, LABELS, CARD))
    try:
        card = json.loads(text)
        digests = card[_DIGESTS]
        for name, data in ((WEIGHTS, weights), (LABELS, names)):
            if hashlib.sha256(data).hexdigest() != digests[name]:
                raise ModelError(
                    f"'{directory / name}' is damaged or of another model than '{CARD}' beside it: its SHA-256 "
                    f"differs. Copy all three files from the run again."
                )
        labels = [str(label) for label in json.loads(names)]
        return safetensors.torch.load(weights), labels, card
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"the model in '{directory}' cannot be read: {error!r}. Copy its files from the run again."
        ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ModelError(
            f"'{path.parent}' holds no whole model: {path.name} is missing. A run's model is in RUN/model "
            f"once the run has finished."
        ) from None
    except OSError as error:
        raise ModelError(f"cannot read '{path}': {error.strerror or error}.") from error
