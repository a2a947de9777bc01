"""Initial weights of a run (`--init`): reading, comparing with the model, and loading.

The rows of the head belong to classes, and another run has other classes in another order. Rows are therefore matched
by class name, never by position.
"""

import pickle
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fedshelf.core.errors import ModelError
from fedshelf.core.events import WeightsLoaded
from fedshelf.models.head import head_names
from fedshelf.models.sales import tower_names
from fedshelf.storage.model_files import LABELS, labels_beside, parse_labels

LABEL_KEYS = ("labels", "class_names", "classes")
"""Metadata key of a safetensors file for the classes of its head."""


@dataclass(frozen=True, kw_only=True, eq=False)
class InitialWeights:
    """The content of a weights file.

    Attributes:
        path: the file.
        tensors: by name.
        labels: the class of each row of the head; None if unknown.
        is_published: whether FedShelf wrote the file.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    labels: tuple[str, ...] | None
    is_published: bool = False


def read_initial_weights(path: Path) -> InitialWeights:
    """Read a safetensors file, or a torch file of plain tensors, and its class names if there are any.

    Args:
        path: the file. Its type is determined by its content, not its name. A `labels.json` in its folder names the
            classes, unless the file's metadata do.

    Returns:
        The content of the file.

    Raises:
        ModelError: the file is missing, empty, damaged or of another type, or the labels do not belong to it.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise ModelError(f"--init {path}: cannot be read: {error.strerror}") from None
    if not start:
        raise ModelError(f"--init {path}: the file is empty. Copy or download it again")
    metadata: Mapping[str, str] = {}
    if start[8:] == b"{":  # a safetensors file starts with the size of a JSON object
        tensors, metadata = _read_safetensors(path)
    elif start.startswith((b"PK", b"\x80")):  # torch writes zip archives, and formerly bare pickles
        tensors = _read_torch(path)
    else:
        raise ModelError(f"--init {path}: this is neither a safetensors file nor a torch file. Is it the right one?")
    broken = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if broken:
        raise ModelError(f"--init {path}: {_some(broken)} holds values that are not finite: training diverged")
    inside = next((metadata[key] for key in LABEL_KEYS if key in metadata), None)
    labels = labels_beside(path) if inside is None else parse_labels(inside, where=f"the metadata of {path}")
    return InitialWeights(path=path, tensors=tensors, labels=labels, is_published="fedshelf" in metadata)


def check_fit(module: nn.Module, weights: InitialWeights) -> str:
    """Compare a file with a model of the same architecture, for any classes.

    Args:
        module: the model; only the number of rows of its head may differ.
        weights: the file.

    Returns:
        Why no row of the file's head can be reused; empty if rows can be matched by name.

    Raises:
        ModelError: tensors are missing, of other shapes or of another architecture, or the number of labels does not
            match.
    """
    own, given, head = module.state_dict(), weights.tensors, head_names(module)
    fresh = head | tower_names(module)
    needed = {name for name, tensor in own.items() if tensor.is_floating_point()}
    unknown = {name for name, tensor in given.items() if name not in own and tensor.is_floating_point()}
    shapes = {name: (tuple(given[name].shape), tuple(own[name].shape)) for name in sorted(own.keys() & given.keys())}
    fitting = {name for name, (of, to) in shapes.items() if of == to or (name in head and of[1:] == to[1:])}
    problems = {
        "tensors that differ": [f"{name} {of} for {to}" for name, (of, to) in shapes.items() if name not in fitting],
        "missing": sorted(needed - given.keys() - fresh),
        "unknown to the model": sorted(unknown),
    }
    if problems["tensors that differ"] or problems["missing"] or unknown - set(extra_tensors(module, weights)):
        found = "; ".join(f"{what} ({len(names)}): {_some(names)}" for what, names in problems.items() if names)
        raise ModelError(
            f"--init {weights.path} does not fit the model: {found}. Give the --model, --norm, --width, and (for a "
            "transformer) --image-size that it was trained with"
        )
    rows = {given[name].shape[0] for name in head & given.keys()}
    if not rows:
        return "the file has no head"
    if weights.labels is None:
        return _how_to_name(weights, max(rows))
    if rows != {len(weights.labels)}:
        raise ModelError(
            f"--init {weights.path}: the rows of its head ({max(rows)}) and its labels ({len(weights.labels)}) are of "
            f"different models. Put the {LABELS} of this file next to it, or take that away to start with "
            "a fresh head"
        )
    return ""


def extra_tensors(module: nn.Module, weights: InitialWeights) -> list[str]:
    """Names of the file's tensors in parts that the model lacks, such as an auxiliary head. They are left out.

    Tensors that the model lacks in a part that it has, such as another layer, are of another architecture.
    """
    parts = {name.partition(".")[0] for name in module.state_dict()}
    return sorted(n for n, t in weights.tensors.items() if n.partition(".")[0] not in parts and t.is_floating_point())


def load_initial_weights(
    module: nn.Module, weights: InitialWeights, names: Sequence[str], aliases: Mapping[str, str] = MappingProxyType({})
) -> WeightsLoaded:  # fmt: skip
    """Load a file, moving each row of the head to the current position of its class.

    Values missing from the file are kept.

    Args:
        module: the model, changed in place.
        weights: the file.
        names: the classes of the model's outputs, by index.
        aliases: by alias, the current name of a class. Equal names take precedence over aliases.

    Returns:
        Which rows of the head were kept, moved, added or dropped.

    Raises:
        ModelError: see `check_fit`.
    """
    reason = check_fit(module, weights)
    own, head = module.state_dict(), head_names(module)
    loaded = {name: tensor for name, tensor in weights.tensors.items() if name in own and name not in head}
    labels = () if reason else weights.labels or ()
    old_row = {_composed(aliases[name]): row for row, name in enumerate(labels) if name in aliases}
    old_row |= {_composed(name): row for row, name in enumerate(labels)}
    moves = {row: old_row[_composed(name)] for row, name in enumerate(names) if _composed(name) in old_row}
    taken = set(moves.values())
    for name in head & weights.tensors.keys():
        loaded[name] = own[name].clone()
        loaded[name][list(moves)] = weights.tensors[name][list(moves.values())].to(own[name])
    module.load_state_dict(loaded, strict=False)
    return WeightsLoaded(
        file=weights.path.name,
        kept=tuple(names[row] for row, old in moves.items() if row == old),
        moved=tuple(names[row] for row, old in moves.items() if row != old),
        added=tuple(name for row, name in enumerate(names) if row not in moves),
        dropped=tuple(name for row, name in enumerate(labels) if row not in taken),
        reason=reason or ("" if moves else "none of the file's classes is in the catalogue"),
    )


def _read_safetensors(path: Path) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"--init {path}: the safetensors file is truncated or damaged: {error}") from error


def _read_torch(path: Path) -> Mapping[str, Tensor]:
    try:
        with path.open("rb") as file:  # given a path, torch would depend on the file's name
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"--init {path}: the file holds more than plain tensors, and such a file can run code: it is not read. "
            "Save the model's state_dict() alone"
        ) from error
    except Exception as error:  # torch raises all kinds of exceptions on damaged archives
        first = str(error).partition("\n")[0]
        raise ModelError(f"--init {path}: the torch file is truncated or damaged: {first}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise ModelError(f"--init {path}: the file does not hold a dictionary of tensors. Save a model's state_dict()")
    return loaded


def _how_to_name(weights: InitialWeights, rows: int) -> str:
    beside = weights.path.with_name(LABELS)
    if weights.is_published:
        return f"{beside} is missing, which names the products of its rows. Copy it from where the file comes from"
    return (
        f"nothing names the classes of the file's {rows:,} rows. If they are your products, write their names to "
        f"{beside}, as a JSON list in the order of the rows"
    )


def _composed(name: str) -> str:
    """The name with composed accents: programs write them either way."""
    return unicodedata.normalize("NFC", name)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + ", …" * (len(names) > 5)
