"""*demo*: what the demo's stores reach alone, by nearest neighbors in pixels, and together.

Everything is trained with the demo's own settings and tested on the demo's test photos.
"""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.photos import link_stores, write_catalogue
from fedshelf.cli.demo import LOCAL_EPOCHS, ROUNDS
from fedshelf.config.schema import RunConfig
from fedshelf.data.cache import PhotoCache
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.dataset import load_photos
from fedshelf.data.demo import make_demo
from fedshelf.data.folder import scan
from fedshelf.data.photo_set import PhotoSet
from fedshelf.simulate.engine import simulate
from fedshelf.tracking.queries import run_summary


def measure(work: Path, seed: int) -> dict[str, Any]:
    """Return the accuracies.

    Args:
        work: An empty folder, or one of an earlier call.
        seed: Seed of the photos and of the training.
    """
    photos = work / "photos"
    if not photos.is_dir():
        make_demo(photos, seed=seed)
    stores = sorted((photos / "stores").iterdir())
    alone = {store.name: link_stores(work / "alone" / store.name, {store.name: store}) for store in stores}
    return {
        "neighbors_in_pixels": _neighbors(photos, stores, work / "cache"),
        "alone": {name: _train(work, seed, folder, name) for name, folder in alone.items()},
        "together": _train(work, seed, photos / "stores", "together"),
    }


def report(figures: dict[str, Any]) -> str:
    """Return the section of RESULTS.md."""
    rows = [
        ["all five stores together", f"{figures['together']:.1%}"],
        *([f"{name} alone", f"{value:.1%}"] for name, value in figures["alone"].items()),
        ["nearest neighbor in pixels", f"{figures['neighbors_in_pixels']:.1%}"],
    ]
    return f"{results.table(['demo photos', 'test accuracy'], rows)}\n\nSimulated, all with the demo's settings."


def _train(work: Path, seed: int, data_dir: Path, name: str) -> float:
    """The accuracy on the test photos after the last round."""
    run_dir, test = work / "runs" / name, work / "photos" / "test"
    config = RunConfig(
        data_dir=data_dir, test_dir=test, rounds=ROUNDS, local_epochs=LOCAL_EPOCHS, min_clients=1, seed=seed,
        run_dir=run_dir, catalogue=write_catalogue(work / "catalogue.txt", test),
    )  # fmt: skip
    simulate(config)
    return run_summary(run_dir).rounds[-1].central_accuracy or 0.0


def _neighbors(photos: Path, stores: list[Path], cache: Path) -> float:
    """The accuracy of the nearest training photo's class (all stores, 48 px, Euclidean distance of raw pixels)."""
    catalogue = Catalogue.resolve({"test": scan(photos / "test", val_fraction=0, seed=0).classes})

    def load(root: Path) -> PhotoSet:
        return load_photos(scan(root, val_fraction=0, seed=0).train, catalogue, PhotoCache(root=cache), 48).photo_set

    train, test = [load(store) for store in stores], load(photos / "test")
    images = np.concatenate([part.images for part in train]).reshape(-1, 48 * 48 * 3).astype(np.float32)
    labels = np.concatenate([part.labels for part in train])
    tests = np.asarray(test.images).reshape(len(test), -1).astype(np.float32)
    distances = (tests**2).sum(1)[:, None] - 2 * tests @ images.T + (images**2).sum(1)
    return float((labels[distances.argmin(1)] == test.labels).mean())
