"""Uses a trained model: loads it, predicts the products in photos, and evaluates it on folders of photos."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedshelf.app.state_directories import default_name
from fedshelf.app.store_sales import StoreSales
from fedshelf.config import places
from fedshelf.core.errors import ModelError, UsageError
from fedshelf.core.guess import Guess
from fedshelf.core.system_errors import content_problem
from fedshelf.core.text import counted, from_filesystem
from fedshelf.data.augmentation import normalize
from fedshelf.data.cache import PhotoCache
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.dataset import LoadedPhotos, load_known, load_photo
from fedshelf.data.folder import class_folder, scan
from fedshelf.data.photo_dates import photo_dates, warn_of_undated
from fedshelf.data.photo_files import SALES, Photo
from fedshelf.data.product_tree import ProductTree
from fedshelf.models.build import build
from fedshelf.models.head import linear_head
from fedshelf.models.own_model import use_model_path
from fedshelf.models.sales import add_sales, tower_names
from fedshelf.models.settings import ModelSettings, Normalization
from fedshelf.storage.model_files import CARD, load_model_files
from fedshelf.storage.run_directory import is_run
from fedshelf.tracking.runs import resolve_run
from fedshelf.training.trainer import EVALUATION_BATCH

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductScore:
    """Evaluation of a model on the photos of one product.

    Attributes:
        label: the product.
        num_photos: number of photos.
        num_correct: number of correctly predicted photos.
        mistaken_for: the most frequent wrong prediction; empty if there is none.
    """

    label: str
    num_photos: int
    num_correct: int
    mistaken_for: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationReport:
    """Evaluation of a model on a folder of labeled photos.

    Attributes:
        products: products with photos, in the order of the model's classes.
        loss: mean cross-entropy (nats).
        left_out: number of photos of unknown products, by folder.
        num_unusable: number of photos that cannot be decoded.
    """

    products: tuple[ProductScore, ...]
    loss: float
    left_out: Mapping[str, int]
    num_unusable: int

    @property
    def num_photos(self) -> int:
        """Number of evaluated photos."""
        return sum(product.num_photos for product in self.products)

    @property
    def accuracy(self) -> float:
        """Fraction of photos that are predicted correctly."""
        return sum(product.num_correct for product in self.products) / self.num_photos


def model_folder(run: str | None, *, best: bool) -> Path:
    """Find the folder of the model to use.

    Args:
        run: a run's folder or id, a client's state directory, or a model's folder. None selects the model of the client
            whose photos or state are in the working directory, or else of the only client on this machine.
        best: use the best round's model instead of the last one's.

    Returns:
        The folder.

    Raises:
        UsageError: there is no such run; or `run` is None and no client or several clients here have a model.
    """
    path = _own_model() if run is None else Path(run)
    if path.is_dir() and not is_run(path):
        folder = path if _is_model(path) else places.client_model(path)
        return folder / "best" if best else folder
    directory = resolve_run(str(path), places.RUNS)
    return directory.best_model if best else directory.model


def _own_model() -> Path:
    here = Path().absolute()
    own = places.client_directory(default_name(here.resolve()))
    found = [folder for folder in (here, places.client_model(here), places.client_model(own)) if _is_model(folder)]
    if not found:
        found = sorted(card.parent for card in own.parent.glob(f"*/{places.client_model(Path())}/{CARD}"))
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(map(str, found))
        raise UsageError(f"several clients on this machine keep a model: choose one of these with --run: {listed}")
    raise UsageError(
        "no client on this machine keeps a model yet: name a run with --run ('fedshelf runs list' shows the runs here)"
    )


def _is_model(folder: Path) -> bool:
    return (folder / CARD).is_file()


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictor:
    """A loaded model.

    Attributes:
        folder: the folder it was loaded from.
        module: the module.
        labels: class names by output.
        image_size: side of the input images in pixels.
        normalization: normalization of the input images.
        tree: the folders above the classes.
        sales: the sales of the store in which photos are taken, if they are used.
        store: the store's name.
    """

    folder: Path
    module: nn.Module
    labels: tuple[str, ...]
    image_size: int
    normalization: Normalization
    tree: ProductTree
    sales: StoreSales | None = None
    store: str = ""

    @classmethod
    def load(cls, folder: Path, *, model_path: Path | None = None) -> "Predictor":
        """Load a model.

        Args:
            folder: the model's folder.
            model_path: folder of the module of a model of the user's own.

        Returns:
            The model.

        Raises:
            ModelError: a file is missing or damaged, or the model cannot be built here.
            UsageError: `model_path` is not a folder.
        """
        use_model_path(places.absolute(model_path) if model_path else None)
        tensors, labels, card = load_model_files(folder)
        try:
            architecture, given = card["architecture"], card["input"]
            settings = ModelSettings(
                name=architecture["name"], num_classes=len(labels), image_size=given["image_size"],
                norm=architecture["norm"], width=architecture["width"], digest=architecture.get("source_digest"),
            )  # fmt: skip
            normalization = Normalization(mean=tuple(given["mean"]), std=tuple(given["std"]))
            paths = tuple(map(str, card.get("paths") or labels))  # older cards have none
            if len(paths) != len(labels):
                raise TypeError(f"{counted(len(paths), 'path')} for {counted(len(labels), 'product')}")
        except (KeyError, TypeError) as error:
            raise ModelError(f"{folder}: the model card does not describe a model: {content_problem(error)}") from None
        module = build(settings, seed=0)
        if architecture.get("sales"):
            add_sales(module)
        try:
            module.load_state_dict(tensors)
        except RuntimeError as error:
            raise ModelError(f"{folder}: the weights do not fit the model that the card describes: {error}") from None
        module.eval()
        return cls(
            folder=folder, module=module, labels=tuple(labels), image_size=settings.image_size,
            normalization=normalization, tree=ProductTree(paths),
        )  # fmt: skip

    def with_sales(self, store: Path) -> "Predictor":
        """A copy that uses a store's sales, wherever a photo's date is known.

        Args:
            store: the store's folder, with its photos and its `sales.csv`.

        Raises:
            UsageError: the model was not trained with sales, or the store has none.
            DataError: its sales or photos cannot be used.
        """
        if not tower_names(self.module):
            raise UsageError(f"--sales {store}: the model in '{self.folder}' was trained without sales")
        catalogue = _catalogue(self.folder, self.labels)
        photos = scan(store, val_fraction=0.0, seed=0).train
        indices = [catalogue.index_of(class_folder(photo.class_path)) for photo in photos]
        labels = np.array([index for index in indices if index is not None], dtype=np.int64)
        sales = StoreSales.of(store, catalogue, labels)
        if sales.history is None:
            raise UsageError(f"--sales {store}: it has no {SALES} with sales of the model's products")
        return replace(self, sales=sales, store=from_filesystem(store.absolute().name))

    def predict(self, photo: Path, *, top: int) -> list[Guess]:
        """Return the `top` most likely products in a photo.

        Raises:
            DataError: the file cannot be read as a photo.
        """
        return self.predict_levels(photo, top=top)[-1]

    def predict_levels(self, photo: Path, *, top: int, day: date | None = None) -> list[list[Guess]]:
        """Predict a photo's product, and the folders that it lies in.

        Args:
            photo: the photo.
            top: number of guesses at each level.
            day: the day on which it was taken, for sales; by default what the photo or its file's name says.

        Returns:
            The most likely folders at each level of the product tree, coarsest first, and last the most likely
            products. A folder has the sum of the probabilities of all products below it.

        Raises:
            DataError: the file cannot be read as a photo.
        """
        images = load_photo(photo, self.image_size)[None]
        days = np.zeros(1, np.int64)
        if self.sales is not None:
            file = Photo(class_path="", path=photo)
            days = np.array([day.toordinal()]) if day else photo_dates(photo.parent, [file])
        probabilities_K = self.logits(images, days).softmax(1)[0]
        folders = [self.tree.nodes(level) for level in range(1, self.tree.depth)]
        return [_most_likely(names, probabilities_K, top) for names in (*folders, self.labels)]

    def labeled_photos(self, photos: Path) -> LoadedPhotos:
        """Load photos of products that the model knows.

        Args:
            photos: a folder with one folder of photos per product.

        Raises:
            DataError: there are no photos of products that the model knows.
        """
        found, cache = scan(photos, val_fraction=0.0, seed=0), PhotoCache(root=places.photo_cache())
        for finding in found.findings:
            logger.warning(finding)
        return load_known(found.train, _catalogue(self.folder, self.labels), cache, self.image_size, whose=str(photos))

    def evaluate(self, photos: Path) -> EvaluationReport:
        """Evaluate the model on labeled photos.

        Args:
            photos: a folder with one folder of photos per product.

        Returns:
            The results.

        Raises:
            DataError: there are no photos of products that the model knows.
        """
        loaded = self.labeled_photos(photos)
        photo_set, size = loaded.photo_set, len(self.labels)
        days = np.zeros(len(photo_set), np.int64)
        if self.sales is not None:
            days = photo_dates(photos, loaded.files, store=self.store)
            warn_of_undated(days, whose=str(photos))
        confusion_KK, loss_sum = np.zeros((size, size), dtype=np.int64), 0.0
        for start in range(0, len(photo_set), EVALUATION_BATCH):
            chosen = slice(start, start + EVALUATION_BATCH)
            labels_B = torch.from_numpy(photo_set.labels[chosen])
            logits_BK = self.logits(photo_set.images[chosen], days[chosen])
            loss_sum += F.cross_entropy(logits_BK.double(), labels_B, reduction="sum").item()
            np.add.at(confusion_KK, (labels_B.numpy(), logits_BK.argmax(1).numpy()), 1)
        return EvaluationReport(
            products=tuple(self._score(k, confusion_KK[k]) for k in range(size) if confusion_KK[k].any()),
            loss=loss_sum / len(photo_set), left_out=loaded.left_out, num_unusable=len(loaded.problems),
        )  # fmt: skip

    def _score(self, index: int, predicted_K: NDArray[np.int64]) -> ProductScore:
        wrong_K = predicted_K.copy()
        wrong_K[index] = 0
        return ProductScore(
            label=self.labels[index], num_photos=int(predicted_K.sum()), num_correct=int(predicted_K[index]),
            mistaken_for=self.labels[int(wrong_K.argmax())] if wrong_K.any() else "",
        )  # fmt: skip

    def logits(self, images_BHWC: NDArray[np.uint8], days_B: NDArray[np.int64] | None = None) -> Tensor:
        """Compute logits, float32 [B, K].

        Args:
            images_BHWC: decoded photos, uint8.
            days_B: the days on which they were taken (ordinals; 0: unknown); None: all are unknown.
        """
        images_BCHW = normalize(
            torch.from_numpy(images_BHWC.copy()), torch.device("cpu"), self.normalization.mean, self.normalization.std
        )
        days_B = np.zeros(len(images_BHWC), np.int64) if days_B is None else days_B
        with torch.inference_mode(), self._taking_sales(days_B):
            logits_BK: Tensor = self.module(images_BCHW)
        return logits_BK

    @contextmanager
    def _taking_sales(self, days_B: NDArray[np.int64]) -> Iterator[None]:
        """Let the output layer's input have the figures of the photos' sales behind it, if there are any."""
        if self.sales is None:
            yield
            return
        figures = torch.from_numpy(self.sales.block(days_B))
        _, head = linear_head(self.module)
        hook = head.register_forward_pre_hook(lambda _, inputs: (torch.cat([inputs[0], figures], dim=1),))
        try:
            yield
        finally:
            hook.remove()


def _most_likely(names_K: tuple[str, ...], probabilities_K: Tensor, top: int) -> list[Guess]:
    """Sum the probabilities of the classes that have one name, and return the most likely names."""
    index = {name: position for position, name in enumerate(dict.fromkeys(names_K))}
    sums = torch.zeros(len(index)).index_add_(0, torch.tensor([index[name] for name in names_K]), probabilities_K)
    values, indices = sums.topk(min(top, len(index)))
    found = list(index)
    return [Guess(label=found[int(i)], probability=float(v)) for v, i in zip(values, indices, strict=True)]


def _catalogue(folder: Path, labels: tuple[str, ...]) -> Catalogue:
    """Return the run's catalogue, which has every store's class names, if it is near the model; else the labels."""
    for above in folder.absolute().parents[:2]:
        if (above / "catalogue.json").is_file():
            catalogue = Catalogue.load(above / "catalogue.json")
            if catalogue.names == labels:
                return catalogue
    return Catalogue(labels, tuple((label,) for label in labels))
