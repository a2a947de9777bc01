"""What tests of the Python API share: settings, and Datasets of the photos in a folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

SMALL: dict[str, Any] = {"image_size": 16, "batch_size": 4, "device": "cpu", "width": 8, "local_epochs": 1}


class Photos(Dataset[Any]):
    """The photos of a folder, in the order of their paths."""

    def __init__(self, root: Path, convert: Callable[[Image.Image], object] = lambda image: image) -> None:
        self.files = sorted(root.rglob("*.png"))
        self.classes = sorted({file.parent.name for file in self.files})
        self.convert = convert

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[object, int]:
        file = self.files[index]
        with Image.open(file) as image:
            return self.convert(image.copy()), self.classes.index(file.parent.name)


def as_floats(image: Image.Image) -> torch.Tensor:
    """[3, H, W] from 0 to 1, as torchvision's ToTensor makes it."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def datasets(convert: Callable[[Image.Image], object] = lambda image: image) -> dict[str, Photos]:
    return {name: Photos(Path("stores") / name, convert) for name in ("lyon", "oslo")}


def same_weights(one: nn.Module | None, other: nn.Module | None) -> bool:
    """Whether two modules have the same tensors, bit for bit."""
    assert one is not None
    assert other is not None
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
