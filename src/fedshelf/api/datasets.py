"""Turns Datasets into photo sets, with the resizing of photo files.

Shapes: N photos, S the image size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from fedshelf.core.errors import DataError
from fedshelf.core.text import some
from fedshelf.data.decode import UnusablePhotoError, from_image, squash
from fedshelf.data.photo_set import PhotoSet

AnyDataset = Dataset[Any]
_TOLERANCE = 1e-3  # of float photos beyond [0, 1], from interpolation


@dataclass(frozen=True, kw_only=True, eq=False)
class NamedPhotos:
    """The photos of a Dataset.

    Attributes:
        images: uint8 [N, S, S, 3].
        names: the name of each photo's class, N in all.
    """

    images: NDArray[np.uint8]
    names: Sequence[str]


def read_datasets(datasets: Mapping[str, AnyDataset], image_size: int) -> list[NamedPhotos]:
    """Read Datasets whose labels index their own `classes`, or are the same numbers in all of them.

    Args:
        datasets: by what to call them in messages.
        image_size: S, in pixels.

    Returns:
        The photos of each. Labels of Datasets without `classes` become numbers of equal length ('07').

    Raises:
        DataError: an item is not a photo with a label, or some Datasets have class names and others do not.
    """
    classes = {name: _classes(dataset) for name, dataset in datasets.items()}
    bare = [name for name, found in classes.items() if found is None]
    if 0 < len(bare) < len(datasets):
        raise DataError(f"the Datasets of {some(bare)} have no attribute 'classes', but others do: give it to all")
    read = {name: _read(name, dataset, image_size, classes[name]) for name, dataset in datasets.items()}
    digits = max((len(str(max(labels))) for _, labels in read.values()), default=1)

    def name_of(label: int, found: Sequence[str] | None) -> str:
        return f"{label:0{digits}}" if found is None else found[label]

    return [
        NamedPhotos(images=images, names=[name_of(label, classes[name]) for label in labels])
        for name, (images, labels) in read.items()
    ]


def indexed(photos: Sequence[NamedPhotos]) -> tuple[list[PhotoSet], tuple[str, ...]]:
    """Number the classes that have photos, in the order of their names.

    Returns:
        The photo sets, and the class names by label.
    """
    names = tuple(sorted({name for found in photos for name in found.names}))
    index_of = {name: index for index, name in enumerate(names)}
    labels = [np.array([index_of[name] for name in found.names], dtype=np.int64) for found in photos]
    return [PhotoSet(found.images, each) for found, each in zip(photos, labels, strict=True)], names


def to_pixels(photo: object, image_size: int) -> NDArray[np.uint8]:
    """Convert one photo to pixels [S, S, 3].

    Args:
        photo: a Pillow image; uint8 [H, W, 3] or [H, W], as an array or a tensor; or float [3, H, W] or [1, H, W] from
            0 to 1.
        image_size: S, in pixels.

    Raises:
        DataError: it is something else.
    """
    try:
        if isinstance(photo, Image.Image):
            return from_image(photo, image_size)
        return squash(_array(photo), image_size)
    except UnusablePhotoError as error:
        raise DataError(str(error)) from error


def _array(photo: object) -> NDArray[np.uint8]:
    array = photo.detach().cpu().numpy() if isinstance(photo, Tensor) else photo
    if not isinstance(array, np.ndarray):
        raise DataError(f"a photo is a {type(photo).__name__}: give a Pillow image, an array or a tensor")
    shape = "x".join(map(str, array.shape))
    if np.issubdtype(array.dtype, np.floating):
        if array.ndim != 3 or array.shape[0] not in (1, 3):
            raise DataError(f"a photo is {array.dtype} of shape {shape}: give floats as [3, H, W]")
        if not (array.size and array.min() >= -_TOLERANCE and array.max() <= 1 + _TOLERANCE):
            span = f"from {array.min():.3g} to {array.max():.3g}" if array.size else "none"
            raise DataError(
                f"a photo has values {span}: give floats from 0 to 1, without Normalize, because FedShelf normalizes "
                "photos itself"
            )
        array = np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    elif array.dtype == np.uint8 and array.ndim == 2:
        array = array[:, :, None]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3):
        raise DataError(f"a photo is {array.dtype} of shape {shape}: give uint8 as [H, W, 3], or floats as [3, H, W]")
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def _read(
    name: str, dataset: AnyDataset, image_size: int, classes: Sequence[str] | None
) -> tuple[NDArray[np.uint8], list[int]]:
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for index, item in enumerate(_items(dataset)):
        try:
            if not isinstance(item, tuple | list) or len(item) != 2:
                raise DataError(f"it is a {type(item).__name__}, not a pair (photo, label)")
            labels.append(_label(item[1], None if classes is None else len(classes)))
            images.append(to_pixels(item[0], image_size))
        except DataError as error:
            raise DataError(f"the Dataset of {name}, item {index}: {error}") from error
    if not images:
        raise DataError(f"the Dataset of {name} is empty")
    return np.stack(images), labels


def _items(dataset: AnyDataset) -> Iterator[Any]:
    if isinstance(dataset, IterableDataset):
        yield from dataset
    else:
        yield from (dataset[index] for index in range(len(dataset)))  # type: ignore[arg-type]


def _label(label: object, num_classes: int | None) -> int:
    if isinstance(label, Tensor | np.ndarray) and label.ndim == 0:
        label = label.item()
    if isinstance(label, bool) or not isinstance(label, int | np.integer) or label < 0:
        raise DataError(f"the label is {label!r}: give the index of a class")
    if num_classes is not None and label >= num_classes:
        raise DataError(f"the label is {label}, and the Dataset's attribute 'classes' has {num_classes} names")
    return int(label)


def _classes(dataset: object) -> Sequence[str] | None:
    """Class names of a Dataset, or of the one that it is a part of (`torch.utils.data.Subset`)."""
    while (classes := getattr(dataset, "classes", None)) is None and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return classes if classes is None else list(map(str, classes))


def is_dataset(value: object) -> bool:
    """Whether a value is a Dataset: of PyTorch, or any object with a length and items that is not a text."""
    return isinstance(value, torch.utils.data.Dataset) or (
        hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, str | bytes | Mapping)
    )
