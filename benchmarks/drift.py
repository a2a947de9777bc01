"""*drift*: how well a store's gradient at the start of a round represents its steps: why SCAFFOLD's option I is worse.

SCAFFOLD adds c - c_i to each local step. Option I's c_i is the gradient at the start of the round, option II's the mean
of the gradients along the steps. The table compares their norms, and how far c - c_i pushes a store in a round (rate ·
steps / (1 - momentum) · its norm) with how far the store moves by itself.
"""

import statistics
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import acceptance, results
from benchmarks.measure import MeasurementError
from fedshelf.app.photos import store_photos
from fedshelf.app.setup import open_setup
from fedshelf.config import files
from fedshelf.config.places import photo_cache
from fedshelf.config.schema import RunConfig
from fedshelf.core.messages import Setup
from fedshelf.core.rng import Rng
from fedshelf.data.cache import PhotoCache
from fedshelf.storage.checkpoints import FileCheckpoints
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.training.trainer import Trainer

RATES = (0.05, 0.005)
ROUNDS = 10


@dataclass(frozen=True, kw_only=True)
class Walk:
    """One store's local training from the global model.

    Attributes:
        at_start: Its gradient at the global model [T].
        mean: The mean gradient along its steps [T].
        moved: How far it moved [T].
        num_steps: In how many steps.
    """

    at_start: Tensor
    mean: Tensor
    moved: Tensor
    num_steps: int


def measure(work: Path, photos_folder: Path) -> str:
    """Simulate the rounds before, and return the section of RESULTS.md.

    Args:
        work: The folder for unpacked photos, stores and the run.
        photos_folder: The folder that holds the groceries-128 pack and `splits/`.
    """
    flags = ("--rounds", str(ROUNDS))
    run_dir = acceptance.simulate(work, photos_folder, 0, work / "drift", flags, workers=2)
    return _table(*_walks(run_dir))


def _walks(run_dir: Path) -> tuple[float, dict[float, list[Walk]]]:
    """The run's momentum, and the walks of all stores from its last model, by rate."""
    directory = RunDirectory.open(run_dir)
    config = files.parse(RunConfig, tomllib.loads(directory.config_toml), where=str(directory.config))
    state = FileCheckpoints(directory.checkpoints).load()
    if state is None or config.data_dir is None:
        raise MeasurementError(f"'{run_dir}' does not hold a simulated run: delete it and start again")
    setup = Setup(
        run_id=directory.run_id, config=files.for_clients(config), catalogue=directory.catalogue.read_text("utf-8"),
        layout_digest="",
    )  # fmt: skip
    opened = open_setup(setup, device="cpu")
    cache, walks = PhotoCache(root=photo_cache()), dict[float, list[Walk]]()
    for store in sorted(config.data_dir.iterdir()):
        photos = store_photos(store, opened, cache, store=store.name)
        trainer = Trainer(
            bound_model=opened.bound_model, client=store.name, rng=Rng(config.seed), train=photos.train,
            validation=photos.validation, num_classes=len(opened.catalogue),
        )  # fmt: skip
        for rate in RATES:
            walks.setdefault(rate, []).append(_walk(trainer, state.model.published, rate))
    return config.momentum, walks


def _walk(trainer: Trainer, model: Tensor, rate: float) -> Walk:
    params = trainer.bound_model.params
    trainer.bound_model.load(model)
    at_start, along = trainer.gradient(round=ROUNDS + 1), torch.zeros_like(params.trainable)

    def add(gradient: Tensor, values: Tensor) -> None:
        along.add_(gradient)

    fit = trainer.fit(round=ROUNDS + 1, client_lr=rate, gradient_hook=add)
    moved = params.trainable - model[: len(along)]
    return Walk(at_start=at_start, mean=along / fit.num_steps, moved=moved, num_steps=fit.num_steps)


def _table(momentum: float, walks: dict[float, list[Walk]]) -> str:
    rows = []
    for rate, each in walks.items():
        reach = [rate / (1 - momentum) * walk.num_steps for walk in each]
        for option, controls in (("I", [w.at_start for w in each]), ("II", [w.mean for w in each])):
            pushes = [by * norm for by, norm in zip(reach, _distances(controls), strict=True)]
            norm = statistics.fmean(float(control.norm()) for control in controls)
            moved = statistics.fmean(float(walk.moved.norm()) for walk in each)
            rows.append([f"{rate:g}", option, f"{norm:.2f}", f"{statistics.fmean(pushes):.2f}", f"{moved:.2f}"])
    columns = ["local rate", "option", "norm of c_i", "push of c - c_i in a round", "the store's own move"]
    return (
        f"{results.table(columns, rows)}\n\nThe acceptance benchmark after {ROUNDS} rounds of FedAvg (seed 0); means "
        "over 8 stores, of norms over all trainable values."
    )


def _distances(controls: Sequence[Tensor]) -> list[float]:
    """The distance of each from the mean of all."""
    common = torch.stack(list(controls)).mean(0)
    return [float((common - control).norm()) for control in controls]
