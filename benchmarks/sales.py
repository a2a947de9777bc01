"""*sales*: what synthetic sales add to an image model, and how well the same training forecasts them.

Real photos of 8 stores, dated by a stated synthetic process (`fedshelf.data.synthetic_sales`); test photos are dated at
each store after all photos that were trained on. Accuracy is on each store's own mix of products.

    image            the exact head on frozen features (`--algorithm ridge`)
    static mix       and the store's mix of products among its training photos
    units prior      and the log of the last 7 days' units against the product's year, or half of it: what is better
    finished         `--train sales --init`: the image model is finished before
    together         `--sales --pretrained`: the output layer is trained, too

Shapes: N test photos of a store, K classes.
"""

import json
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import acceptance, photos, results
from benchmarks.fedshelf_cli import FedShelfCli
from fedshelf.app.predictor import Predictor
from fedshelf.app.store_sales import StoreSales
from fedshelf.config.places import folder_name
from fedshelf.core.sales_columns import FEATURES, HAS, MIX, WIDTH
from fedshelf.data.cache import PhotoCache
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.dataset import load_photos
from fedshelf.data.folder import scan
from fedshelf.data.photo_dates import UNKNOWN, photo_dates
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.training.photo_scores import reweighted_accuracy

SIZE, ROUNDS = 96, 10
FACTORS, FLOOR = (0.5, 1.0), -3.0  # of the units prior
LITE0 = ("--model", "tf_efficientnet_lite0", "--image-size", str(SIZE))
CASES = ((0.6, 1.0), (0.6, 0.0), (1.0, 1.0))
"""Share of the time for which products are listed, and gamma."""
WAYS = ("finished", "together")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The result of one case and seed: means over stores.

    Attributes:
        accuracies: by model.
        errors: error of the forecast (WAPE) by method.
        num_using: stores that use their sales, by way of training.
    """

    accuracies: Mapping[str, float]
    errors: Mapping[str, float]
    num_using: Mapping[str, int]


def measure(work: Path, photos_folder: Path, seeds: Sequence[int]) -> str:
    """Run all cases, and return the section of RESULTS.md; interrupted runs resume.

    Args:
        work: The folder for unpacked photos, stores and runs.
        photos_folder: The folder that holds the groceries-128 pack and `splits/`.
        seeds: Seeds of splits, sales and training.
    """
    found = {case: [_case(work.absolute(), photos_folder, seed, *case) for seed in seeds] for case in CASES}
    return report(found)


def report(found: Mapping[tuple[float, float], Sequence[Figures]]) -> str:
    """Two tables: accuracies, and errors of forecasts."""
    models = ("image", "static mix", "units prior", *WAYS)
    rows, errors = [], []
    for (listed, gamma), of in found.items():
        name = f"listed {listed:.0%}, gamma {gamma:g}"
        means = [f"{statistics.fmean(one.accuracies[model] for one in of):.1%}" for model in models]
        using = " / ".join(str(sum(one.num_using[way] for one in of)) for way in WAYS)
        rows.append([name, *means, using, str(len(of))])
        methods = ("last_week", "four_week_mean", "year_ago", *WAYS)
        errors.append([name, *(f"{statistics.fmean(one.errors[method] for one in of):.3f}" for method in methods)])
    return "\n\n".join(
        [
            results.table(["", *models, "stores that use sales", "seeds"], rows),
            results.table(["WAPE", "last week", "4-week mean", "year ago", *WAYS], errors),
            "Synthetic sales, real photos: 8 stores (Dirichlet 0.3), 81 products, EfficientNet-Lite0 with ImageNet "
            f"weights, frozen, at {SIZE} px. Accuracy on each store's own mix of products, on official test photos, "
            f"mean over stores; {ROUNDS} rounds. *image* is the exact head, *static mix* adds the mix of products, "
            "*units prior* also the log of the last 7 days' units against the product's year. *finished* trains the "
            "sales tower on the finished image model, *together* with the output layer. WAPE is the error of the "
            "forecast of 7 days, on the last 8 weeks, which no forecast is trained on.",
        ]
    )


def _case(work: Path, photos_folder: Path, seed: int, listed: float, gamma: float) -> Figures:
    """Run one case."""
    cli, flags = FedShelfCli(home=work / "home"), ("--seed", str(seed), *LITE0)
    dealt = acceptance.partition(work, photos_folder, seed)
    place = work / f"sales-{seed}-{listed:g}-{gamma:g}"
    stores, test = place / "stores", place / "test"
    if not (test / "photos.csv").exists():
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(dealt, stores)
        shutil.copytree(photos.unpack(photos_folder, work) / "test", test)
        given = ("--gamma", str(gamma), "--listed", str(listed), "--seed", str(seed))
        cli.run("data", "synthetic-sales", str(stores), "--test-dir", str(test), *given)
    data = ("--data-dir", str(stores), "--test-dir", str(test), *flags)
    image = place / "image"
    cli.run("simulate", *data, "--algorithm", "ridge", "--pretrained", "--run-dir", str(image))
    start = str(RunDirectory.open(image).model / "model.safetensors")
    ways = {"finished": ("--train", "sales", "--init", start), "together": ("--pretrained",)}
    for way, more in ways.items():
        cli.run("simulate", *data, "--sales", *more, "--rounds", str(ROUNDS), "--run-dir", str(place / way))
    cards = {way: _cards(RunDirectory.open(place / way), stores) for way in ways}
    kept = work / f"sales-logits-{seed}.npy"
    accuracies = _without_a_tower(RunDirectory.open(image), stores, test, home=cli.home, kept=kept)
    errors: dict[str, float] = {}
    for way, of in cards.items():
        accuracies[way] = _mean(card["metrics"]["own_mix_accuracy"][card["candidate"]] for card in of)
        wape = [card["metrics"]["forecast_wape"] for card in of]
        errors |= {name: _mean(one[name] for one in wape) for name in wape[0] if name != "model"}
        errors[way] = _mean(one["model"] for one in wape)
    num_using = {way: sum(card["candidate"] != "global" for card in of) for way, of in cards.items()}
    return Figures(accuracies=accuracies, errors=errors, num_using=num_using)


def _cards(directory: RunDirectory, stores: Path) -> list[dict[str, Any]]:
    names = sorted(path.name for path in stores.iterdir())
    paths = (directory.stores / folder_name(name) / "model_card.json" for name in names)
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _without_a_tower(
    directory: RunDirectory, stores: Path, test: Path, *, home: Path, kept: Path
) -> dict[str, float]:  # fmt: skip
    """Accuracies of the image model, with the static mix, and with a prior of units, as means over stores.

    The image model's logits are the same in all cases of a seed, and are kept in a file.
    """
    catalogue, cache = Catalogue.load(directory.catalogue), PhotoCache(root=home / "cache")
    tested = load_photos(scan(test, val_fraction=0.0, seed=0).train, catalogue, cache, SIZE)
    if not kept.exists():
        np.save(kept, _image_logits(directory, tested.photo_set.images).numpy())
    logits_NK = torch.from_numpy(np.load(kept))
    found: dict[str, list[float]] = {}
    for folder in sorted(stores.iterdir()):
        trained = scan(folder, val_fraction=0.1, seed=0).train
        own = load_photos(trained, catalogue, cache, SIZE).photo_set.labels
        sales, days = StoreSales.of(folder, catalogue, own), photo_dates(test, tested.files, store=folder.name)
        dated = days != UNKNOWN
        figures = torch.from_numpy(sales.block(days[dated])).view(-1, len(catalogue), WIDTH)
        week, year = (figures[..., FEATURES.index(name)] for name in ("units_7", "level"))
        labels, logits = tested.photo_set.labels[dated], logits_NK[torch.from_numpy(dated)]
        static, units = logits + figures[..., MIX], figures[..., HAS] * (week - year).clamp(min=FLOOR)
        priors = [static + factor * units for factor in FACTORS]
        for name, tried in {"image": [logits], "static mix": [static], "units prior": priors}.items():
            rights = [one.argmax(1).numpy() == labels for one in tried]
            found.setdefault(name, []).append(max(reweighted_accuracy(right, labels, own) or 0.0 for right in rights))
    return {name: _mean(values) for name, values in found.items()}


def _image_logits(directory: RunDirectory, images: NDArray[np.uint8]) -> Tensor:
    predictor = Predictor.load(directory.model)
    unknown = np.zeros(len(images), np.int64)
    parts = [slice(start, start + 250) for start in range(0, len(images), 250)]
    return torch.cat([predictor.logits(images[part], unknown[part]) for part in parts])


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)
