"""*drift*: what a store's gradient at the round's start is worth along its steps: why SCAFFOLD's option I falls behind.

    python -m benchmarks.drift

SCAFFOLD adds c - c_i to each local step. Option I's c_i is the gradient at the round's start, option II's the mean of
those along the steps. Compared are the norms of both, and how far a round of c - c_i pushes a store (rate · steps /
(1 - momentum) · its norm) with how far the store moves by itself.
"""

import argparse
import statistics
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import acceptance, results
from fedshelf.app.components import open_setup, store_photos
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
    """One store's local training from the global model: its gradient [T] there, the mean [T] of those along its steps,
    by how much it moved [T] in how many steps."""

    at_start: Tensor
    mean: Tensor
    moved: Tensor
    num_steps: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=acceptance.PHOTOS, help="folder with groceries-128.tar.gz")
    parser.add_argument("--work", type=Path, default=Path("runs") / "studies", help="where photos and runs go")
    parser.add_argument("--write", action="store_true", help="write the section into benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    flags = ("--rounds", str(ROUNDS))
    run_dir = acceptance.simulate(arguments.work, arguments.photos, 0, arguments.work / "drift", flags, workers=2)
    momentum, walks = _walks(run_dir)
    text = _table(momentum, walks)
    print(text)
    if arguments.write:
        results.write("drift", text, "python -m benchmarks.drift")


def _walks(run_dir: Path) -> tuple[float, dict[float, list[Walk]]]:
    """The run's momentum, and by rate the walks of all stores from its last model."""
    directory = RunDirectory.open(run_dir)
    config = files.parse(RunConfig, tomllib.loads(directory.config_toml), where=str(directory.config))
    state = FileCheckpoints(directory.checkpoints).load()
    if state is None or config.data_dir is None:
        raise SystemExit(f"{run_dir} holds no simulated run")
    setup = Setup(
        run_id=directory.run_id, config=files.for_clients(config), catalogue=directory.catalogue.read_text("utf-8"),
        layout_digest="",
    )  # fmt: skip
    opened = open_setup(setup, device="cpu")
    cache, walks = PhotoCache(root=photo_cache()), dict[float, list[Walk]]()
    for store in sorted(config.data_dir.iterdir()):
        photos = store_photos(store, opened, cache)
        trainer = Trainer(
            bound_model=opened.bound_model, client=store.name, rng=Rng(config.seed), train=photos.train,
            validation=photos.validation, num_classes=len(opened.catalogue),
        )  # fmt: skip
        for rate in RATES:
            walks.setdefault(rate, []).append(_walk(trainer, state.model, rate))
    return config.momentum, walks


def _walk(trainer: Trainer, model: Tensor, rate: float) -> Walk:
    params = trainer.bound_model.params
    trainer.bound_model.load(model)
    at_start, along = trainer.gradient(round=ROUNDS + 1), torch.zeros_like(params.trainable)

    def note(gradient: Tensor, values: Tensor) -> None:
        along.add_(gradient)

    fit = trainer.fit(round=ROUNDS + 1, client_lr=rate, gradient_hook=note)
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
    columns = ["local rate", "option", "norm of c_i", "push of c - c_i in a round", "a store moves by itself"]
    return (
        f"{results.table(columns, rows)}\n\nThe acceptance benchmark after {ROUNDS} rounds of FedAvg (seed 0); means "
        "over 8 stores of norms over all trainable values."
    )


def _distances(controls: Sequence[Tensor]) -> list[float]:
    """How far each is from the mean of all."""
    common = torch.stack(list(controls)).mean(0)
    return [float((common - control).norm()) for control in controls]


if __name__ == "__main__":
    main()
