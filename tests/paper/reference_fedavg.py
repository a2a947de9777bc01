"""FedAvg as the paper states it (McMahan et al. 2017, Algorithm 1), in plain torch: to read, and to test against.

No flat vectors, no ports, no messages: modules, state dicts, one loop. It shares with the engine only the keyed
random numbers and the definition of normalized photos.
"""

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedshelf.core.rng import Rng
from fedshelf.data.photo_set import PhotoSet


def federated_averaging(
    model: nn.Module, stores: Mapping[str, PhotoSet], *, rounds: int, epochs: int, batch: int, lr: float,
    momentum: float, seed: int,
) -> nn.Module:  # fmt: skip
    """w_{t+1} = sum_k n_k/n · w_k over all stores, each trained from w_t; batch statistics averaged like weights."""
    n = sum(len(photos) for photos in stores.values())
    for t in range(1, rounds + 1):
        average: dict[str, Tensor] = {}
        for k, photos in sorted(stores.items()):
            local = client_update(copy.deepcopy(model), photos, Rng(seed).fork(round=t, client=k, purpose="shuffle"),
                                  epochs=epochs, batch=batch, lr=lr, momentum=momentum)  # fmt: skip
            for name, w in local.state_dict().items():
                average[name] = average.get(name, 0) + w.double() * len(photos) / n
        model.load_state_dict(average)
    return model


def client_update(
    model: nn.Module, photos: PhotoSet, rng: Rng, *, epochs: int, batch: int, lr: float, momentum: float
) -> nn.Module:  # fmt: skip
    """Local epochs of SGD from w_t, in an order drawn by `rng`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, nesterov=momentum > 0)
    generator = rng.torch()
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(photos), generator=generator).split(batch):
            optimizer.zero_grad()
            labels = torch.from_numpy(photos.labels[chosen.numpy()])
            F.cross_entropy(model(normalized(photos, chosen)), labels).backward()
            optimizer.step()
    return model


def normalized(photos: PhotoSet, chosen: Tensor) -> Tensor:
    """[B, 3, H, W]: scaled to [0, 1], then ImageNet's mean and standard deviation."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images_BHWC = torch.from_numpy(photos.images[chosen.numpy()]).float() / 255
    return ((images_BHWC - mean) / std).permute(0, 3, 1, 2)
