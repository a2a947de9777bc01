"""A trained model as three files: weights, class names, and a model card.

The card is written last and holds the digests of the other two, so that loading detects mismatched files.
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
from fedshelf.core.system_errors import content_problem
from fedshelf.serialization import records
from fedshelf.serialization.tensor_file import tensor_chunks
from fedshelf.storage.atomic_files import make_own_folder, write_together

WEIGHTS = "model.safetensors"
LABELS = "labels.json"
CARD = "model_card.json"
_DIGESTS = "sha256"


def save_model(
    directory: Path, state_dict: Mapping[str, Tensor], labels: Sequence[str], card: Mapping[str, Any]
) -> None:
    """Replace the model in `directory`, all three files together.

    Args:
        directory: the model's folder.
        state_dict: the module's tensors by name, as `load_state_dict` expects them.
        labels: the class names; index i is output i.
        card: the model card, as JSON values; `sha256` is added.

    Raises:
        RunError: the disk is full, ...; the previous model is unaffected.
    """
    make_own_folder(directory)
    weights = b"".join(tensor_chunks(state_dict, {}))
    names = records.dump(list(labels), indent=1).encode() + b"\n"
    digests = {WEIGHTS: hashlib.sha256(weights).hexdigest(), LABELS: hashlib.sha256(names).hexdigest()}
    text = records.dump({**card, _DIGESTS: digests}, indent=1) + "\n"
    write_together({directory / WEIGHTS: weights, directory / LABELS: names, directory / CARD: text})


def has_model(directory: Path) -> bool:
    """Whether a model was saved in `directory`."""
    return (directory / CARD).is_file()


def load_model_files(directory: Path) -> tuple[dict[str, Tensor], list[str], dict[str, Any]]:
    """Read what `save_model` wrote.

    Returns:
        The state dict, the class names and the card.

    Raises:
        ModelError: a file is missing, damaged, or belongs to another model.
    """
    weights, names, text = (_read(directory / name) for name in (WEIGHTS, LABELS, CARD))
    try:
        card = json.loads(text)
        _check_digests(card[_DIGESTS], directory / WEIGHTS, weights, names)
        labels = parse_labels(names, where=f"'{directory / LABELS}'")
        return safetensors.torch.load(weights), list(labels), card
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"the model in '{directory}' cannot be read: {content_problem(error)}. Copy its files from the run again."
        ) from error


def labels_beside(weights: Path) -> tuple[str, ...] | None:
    """The class names in the folder of a weights file.

    Args:
        weights: the file, of any name.

    Returns:
        The class name of each output; None if there is no `labels.json`.

    Raises:
        ModelError: `labels.json` cannot be read, or the model card says that it belongs to another model.
    """
    folder = weights.parent
    if not (folder / LABELS).exists():
        return None
    names = _read(folder / LABELS)
    if (folder / CARD).exists():
        try:
            _check_digests(json.loads(_read(folder / CARD))[_DIGESTS], weights, _read(weights), names)
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"'{folder / CARD}' is not a model card of FedShelf: {content_problem(error)}. Remove it."
            ) from error
    return parse_labels(names, where=f"'{folder / LABELS}'")


def parse_labels(text: bytes | str, *, where: str) -> tuple[str, ...]:
    """Parse class names from JSON.

    Args:
        text: a list of distinct strings.
        where: the source, for the error message.

    Raises:
        ModelError: the text is something else.
    """
    try:
        labels = json.loads(text)
    except ValueError as error:
        raise ModelError(f"{where}: the class names are not JSON: {error}") from error
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ModelError(f"{where}: the class names must be a JSON list of texts")
    if len(set(labels)) < len(labels):
        twice = sorted({label for label in labels if labels.count(label) > 1})
        raise ModelError(f"{where}: class names must be distinct, and these are not: {', '.join(twice[:5])}")
    return tuple(labels)


def _check_digests(digests: Mapping[str, str], path: Path, weights: bytes, names: bytes) -> None:
    """Compare a weights file and the class names with the digests in the model card."""
    for name, data, said in ((path.name, weights, digests[WEIGHTS]), (LABELS, names, digests[LABELS])):
        if hashlib.sha256(data).hexdigest() != said:
            raise ModelError(
                f"'{path.with_name(name)}' is damaged or of another model than '{CARD}' next to it: its SHA-256 "
                "differs. Copy all three files from the run again, or move a file of another model to a folder of its "
                "own."
            )


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
