"""Does the demo's photo set deserve a federation? What each store reaches alone, neighbors in pixels, and all together.

    python -m benchmarks.demo --work FOLDER

Everything is trained with the demo's own settings and tested on the demo's test photos. Prints a line of JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results
from fedshelf.cli.demo import LOCAL_EPOCHS, ROUNDS
from fedshelf.config.schema import RunConfig
from fedshelf.data.cache import PhotoCache
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.dataset import PhotoSet, load_photos
from fedshelf.data.demo import make_demo
from fedshelf.data.folder import scan
from fedshelf.simulate.engine import simulate
from fedshelf.tracking.queries import run_summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="an empty or earlier folder of this benchmark")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write the section into benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    photos = arguments.work / "photos"
    if not photos.is_dir():
        make_demo(photos, seed=arguments.seed)
    stores = sorted((photos / "stores").iterdir())
    for store in stores:  # one store as a whole federation: a folder of stores that holds only this one
        (arguments.work / "alone" / store.name).mkdir(parents=True, exist_ok=True)
        link = arguments.work / "alone" / store.name / store.name
        if not link.exists():
            link.symlink_to(store.absolute(), target_is_directory=True)
    figures: dict[str, Any] = {
        "neighbors_in_pixels": _neighbors(photos, stores, arguments.work / "cache"),
        "alone": {store.name: _train(arguments, arguments.work / "alone" / store.name, store.name) for store in stores},
        "together": _train(arguments, photos / "stores", "together"),
    }
    print(json.dumps(figures))
    if arguments.write:
        rows = [
            ["all five stores together", f"{figures['together']:.1%}"],
            *([f"{name} alone", f"{value:.1%}"] for name, value in figures["alone"].items()),
            ["nearest neighbor in pixels", f"{figures['neighbors_in_pixels']:.1%}"],
        ]
        text = results.table(["demo photos", "test accuracy"], rows)
        results.write(
            "demo", f"{text}\n\nThe demo's settings for all; simulated.", "python -m benchmarks.demo --work demo-check"
        )


def _train(arguments: argparse.Namespace, data_dir: Path, name: str) -> float:
    """Accuracy on the test photos after the last round."""
    run_dir = arguments.work / "runs" / name
    config = RunConfig(
        data_dir=data_dir, test_dir=arguments.work / "photos" / "test", rounds=ROUNDS, local_epochs=LOCAL_EPOCHS,
        min_clients=1, seed=arguments.seed, run_dir=run_dir,
        catalogue=_catalogue(arguments.work),
    )  # fmt: skip
    simulate(config)
    return run_summary(run_dir).rounds[-1].central_accuracy or 0.0


def _catalogue(work: Path) -> Path:
    """All products: a store alone is tested on those it does not sell, too."""
    path = work / "catalogue.txt"
    path.write_text("\n".join(sorted(folder.name for folder in (work / "photos" / "test").iterdir())) + "\n")
    return path


def _neighbors(photos: Path, stores: list[Path], cache: Path) -> float:
    """Accuracy of the class of the nearest training photo (all stores', 48 px, Euclidean in raw pixels)."""
    catalogue = Catalogue.resolve({"test": scan(photos / "test", val_fraction=0, seed=0).classes})

    def load(root: Path) -> PhotoSet:
        return load_photos(scan(root, val_fraction=0, seed=0).train, catalogue, PhotoCache(root=cache), 48).photo_set

    train, test = [load(store) for store in stores], load(photos / "test")
    images = np.concatenate([part.images for part in train]).reshape(-1, 48 * 48 * 3).astype(np.float32)
    labels = np.concatenate([part.labels for part in train])
    tests = np.asarray(test.images).reshape(len(test), -1).astype(np.float32)
    distances = (tests**2).sum(1)[:, None] - 2 * tests @ images.T + (images**2).sum(1)
    return float((labels[distances.argmin(1)] == test.labels).mean())


if __name__ == "__main__":
    main()
