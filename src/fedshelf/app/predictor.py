"""A trained model put to use: its files loaded, photos named."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fedshelf.config import places
from fedshelf.core.errors import ModelError
from fedshelf.data.augmentation import normalize
from fedshelf.data.dataset import load_photo
from fedshelf.models.build import ModelSettings, Normalization, build
from fedshelf.storage.model_files import load_model_files
from fedshelf.storage.run_directory import is_run
from fedshelf.tracking.runs import resolve_run


@dataclass(frozen=True, kw_only=True, slots=True)
class Guess:
    """One product and how likely the model holds it to be."""

    label: str
    probability: float


def model_folder(run: str, *, best: bool) -> Path:
    """Where a run's model lies: `run` is a run's folder or id, or itself a folder with model files.

    Raises:
        UsageError: there is no such run.
    """
    path = Path(run)
    if path.is_dir() and not is_run(path):
        return path / "best" if best else path
    directory = resolve_run(run, places.RUNS)
    return directory.best_model if best else directory.model


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictor:
    """A model with its class names, ready for photos."""

    module: nn.Module
    labels: tuple[str, ...]
    image_size: int
    normalization: Normalization

    @classmethod
    def load(cls, folder: Path) -> "Predictor":
        """Read the files that a run published.

        Raises:
            ModelError: a file is missing or damaged, or the card describes a model that cannot be built here.
        """
        tensors, labels, card = load_model_files(folder)
        try:
            architecture, given = card["architecture"], card["input"]
            settings = ModelSettings(
                name=architecture["name"], num_classes=len(labels), image_size=given["image_size"],
                norm=architecture["norm"], width=architecture["width"],
            )  # fmt: skip
            normalization = Normalization(mean=tuple(given["mean"]), std=tuple(given["std"]))
        except (KeyError, TypeError) as error:
            raise ModelError(f"{folder}: the model card does not describe a model ({error!r})") from None
        module = build(settings, seed=0)
        try:
            module.load_state_dict(tensors)
        except RuntimeError as error:
            raise ModelError(f"{folder}: the weights do not fit the model that the card describes: {error}") from None
        module.eval()
        return cls(
            module=module, labels=tuple(labels), image_size=settings.image_size, normalization=normalization
        )  # fmt: skip

    def predict(self, photo: Path, *, top: int) -> list[Guess]:
        """The `top` likeliest products in one photo.

        Raises:
            DataError: it cannot be read as a photo.
        """
        image_HWC = load_photo(photo, self.image_size)
        images_1CHW = normalize(
            torch.from_numpy(image_HWC[None]), torch.device("cpu"), self.normalization.mean, self.normalization.std
        )
        with torch.inference_mode():
            probabilities_K = self.module(images_1CHW).softmax(1)[0]
        values, indices = probabilities_K.topk(min(top, len(self.labels)))
        return [
            Guess(label=self.labels[int(i)], probability=float(v)) for v, i in zip(values, indices, strict=True)
        ]  # fmt: skip
