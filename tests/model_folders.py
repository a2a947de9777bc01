"""Folders of trained models for tests, without a run: random features, and an output layer that knows the products."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedshelf.data.augmentation import normalize
from fedshelf.models.build import build, normalization_of
from fedshelf.models.head import linear_head
from fedshelf.models.settings import ModelSettings
from fedshelf.storage.model_files import save_model

COLORS = {"Red": (220, 40, 40), "Green": (40, 200, 60), "Blue": (50, 60, 220)}


def tinted(label: str, seed: int, height: int = 40, width: int = 40) -> NDArray[np.uint8]:
    """A noisy photo of a product's color: uint8 [height, width, 3]."""
    noise = np.random.default_rng([seed, len(label)]).normal(0, 30, (height, width, 3))
    return np.clip(np.array(COLORS[label]) + noise, 0, 255).astype(np.uint8)


def write_tinted(root: Path, counts: int, *, seed: int = 0) -> Path:
    """A folder with photos of each color."""
    from PIL import Image

    for label in COLORS:
        (root / label).mkdir(parents=True)
        for number in range(counts):
            Image.fromarray(tinted(label, seed + number)).save(root / label / f"{number:03}.png")
    return root


def write_model(
    folder: Path, name: str = "resnet10", *, image_size: int = 16, labels: Sequence[str] = tuple(COLORS),
    norm: str = "batch", trained: bool = True, **card: Any,
) -> nn.Module:  # fmt: skip
    """Save a model with random weights, and return its module.

    Args:
        folder: the model's folder.
        name: name of the model.
        image_size: side of its photos.
        labels: its products.
        norm: kind of normalization layers.
        trained: whether its output layer tells the colors apart.
        card: further fields of its card.
    """
    settings = ModelSettings(name=name, num_classes=len(labels), image_size=image_size, norm=norm, width=8)  # type: ignore[arg-type]
    module = build(settings, seed=0).eval()
    values = normalization_of(module)
    if trained:
        _fit(module, image_size, labels)
    given = {
        "architecture": {"name": name, "norm": norm, "width": 8},
        "input": {"image_size": image_size, "mean": list(values.mean), "std": list(values.std)},
        "training": {"algorithm": "fedavg", "seed": 0, "clients_counted_last_round": 3},
        "metrics": {"accuracy": 0.75, "central_accuracy": None},
        "run_id": "r", "round": 2,
    }  # fmt: skip
    save_model(folder, module.state_dict(), labels, given | card)
    return module


@torch.no_grad()
def _fit(module: nn.Module, image_size: int, labels: Sequence[str]) -> None:
    """Solve the output layer by ridge regression on the features of some photos."""
    photos = np.stack([tinted(label, 1000 + n, image_size, image_size) for label in labels for n in range(30)])
    targets = torch.eye(len(labels)).repeat_interleave(30, 0)
    values, seen = normalization_of(module), list[torch.Tensor]()
    _, head = linear_head(module)
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module(normalize(torch.from_numpy(photos), torch.device("cpu"), values.mean, values.std))
    hook.remove()
    features = torch.cat([seen[0], torch.ones(len(photos), 1)], 1)
    gram = features.T @ features + 1e-3 * torch.eye(features.shape[1])
    solved = torch.linalg.solve(gram, features.T @ targets)
    assert isinstance(head, nn.Linear)
    head.weight.copy_(8 * solved[:-1].T)
    head.bias.copy_(8 * solved[-1])
