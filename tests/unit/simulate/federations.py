"""Clients to give to any simulation backend, and rounds to play on them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedshelf.app.model import ModuleFactory, bound_model_of
from fedshelf.compression.download import name_of
from fedshelf.config import files
from fedshelf.config.schema import RunConfig
from fedshelf.core.messages import FROZEN, Broadcast, ClientMessage, Purpose, Ready, Setup, TaskKey, Upload
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.photo_set import PhotoSet
from fedshelf.simulate.client_runner import Backend, ClientRunner
from fedshelf.simulate.stores import MemoryStores

CLASSES = ("apple", "milk", "tea")


def photos(seed: int, count: int, size: int) -> PhotoSet:
    """Noise on a tint that tells the class."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, len(CLASSES), count)
    images = draw.integers(0, 130, (count, size, size, 3))
    images[np.arange(count), :, :, labels] += 60
    return PhotoSet(images.astype(np.uint8), labels.astype(np.int64))


@dataclass(frozen=True, kw_only=True)
class Federation:
    """A player of stores in memory, and the setup that its clients are given."""

    runner: ClientRunner
    setup: Setup
    start: Tensor
    names: tuple[str, ...]

    @classmethod
    def of(
        cls, states: Path, counts: Mapping[str, int], *, model: ModuleFactory | None = None, size: int = 16,
        test_photos: int = 0, **values: Any,
    ) -> "Federation":  # fmt: skip
        """Stores of so many photos each."""
        given: dict[str, Any] = {"device": "cpu", "image_size": size, "batch_size": 4, "local_epochs": 1, "width": 8}
        config = RunConfig(**{**given, **values})
        stores = {name: photos(seed, count, size) for seed, (name, count) in enumerate(counts.items())}
        catalogue = Catalogue.resolve({"all": MemoryStores(stores, None, CLASSES).classes("")})
        bench = bound_model_of(config, catalogue, device="cpu", make_module=model)
        frozen = bench.frozen_values()
        setup = Setup(
            run_id="run", config=files.for_clients(config), catalogue=catalogue.to_json(),
            layout_digest=bench.params.layout.digest, frozen="" if frozen is None else name_of(frozen),
            vectors={} if frozen is None else {FROZEN: frozen},
        )  # fmt: skip
        test = photos(99, test_photos, size) if test_photos else None
        runner = ClientRunner(
            stores=MemoryStores(stores, test, CLASSES), device="cpu", make_module=model, states=states
        )
        return cls(runner=runner, setup=setup, start=bench.params.shared.clone(), names=tuple(stores))

    def set_up(self, backend: Backend) -> None:
        """Everybody gets the setup, and is ready."""
        for name in self.names:
            backend.submit(name, self.setup)
        for _ in self.names:
            answered = backend.next()
            assert answered is not None
            assert isinstance(answered[1], Ready), answered[1]

    def round(
        self, backend: Backend, *, params: Tensor | None = None, number: int = 1, lr: float,
        num_steps: Mapping[str, int] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Everybody trains (for so many steps each; else as configured); the answers by name."""
        key = TaskKey(run_id="run", round=number, attempt=0)
        params = self.start if params is None else params
        for name in self.names:
            steps = (num_steps or {}).get(name)
            backend.submit(
                name,
                Broadcast(key=key, purpose=Purpose.TRAIN, vectors={"params": params}, client_lr=lr, num_steps=steps),
            )
        answers: dict[str, ClientMessage] = {}
        while len(answers) < len(self.names):
            answered = backend.next()
            assert answered is not None
            answers[answered[0]] = answered[1]
        assert backend.next() is None
        return answers


def mean(uploads: Mapping[str, Upload]) -> Tensor:
    """The mean delta, weighted by photos."""
    total = sum(upload.weight for upload in uploads.values())
    return torch.stack([u.delta.double() * (u.weight / total) for u in uploads.values()]).sum(0).float()
