"""The teacher of a run that distills: from a model on disk to the stores that ask it.

The server sends it once, with the setup, as it does the values that never change: a description and one vector. The
run's configuration names its digest, so that all stores have the same one.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from fedshelf.app.predictor import model_folder
from fedshelf.config.schema import RunConfig
from fedshelf.core.choices import NormName
from fedshelf.core.errors import FedShelfError, ModelError, RefusedError, UsageError
from fedshelf.core.messages import Setup
from fedshelf.core.text import some
from fedshelf.models.build import build
from fedshelf.models.registry import is_own
from fedshelf.models.settings import ModelSettings, Normalization
from fedshelf.storage.model_files import has_model, load_model_files
from fedshelf.training.distillation import Teacher

logger = logging.getLogger(__name__)
Triple = tuple[float, float, float]


class Description(BaseModel):
    """What a teacher is, besides its values.

    Attributes:
        run_id: the run whose stores teach by models of their own; "": the teacher is the same for all.
        dp: that run's differential privacy.
        name: name of the model.
        norm: kind of normalization layers.
        width: width of `resnet10`.
        image_size: side of its photos in pixels.
        mean: normalization of its photos, per channel.
        std: normalization of its photos, per channel.
        labels: its products, in the order of its outputs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    run_id: str
    dp: str
    name: str
    norm: NormName
    width: int
    image_size: int
    mean: Triple
    std: Triple
    labels: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherModel:
    """A teacher as it is sent.

    Attributes:
        description: what it is besides its values.
        values: its tensors [V] one after another, sorted by name.
    """

    description: Description
    values: Tensor

    @classmethod
    def read(cls, folder: Path) -> "TeacherModel":
        """Read a run's or a store's model.

        Args:
            folder: the model's folder.

        Raises:
            ModelError: a file is missing or damaged, or the model cannot teach.
        """
        tensors, labels, card = load_model_files(folder)
        try:
            architecture, given = card["architecture"], card["input"]
            description = Description(
                run_id=card["run_id"], dp=card["training"].get("dp", "none"), name=architecture["name"],
                norm=architecture["norm"], width=architecture["width"], image_size=given["image_size"],
                mean=given["mean"], std=given["std"], labels=tuple(labels),
            )  # fmt: skip
        except (KeyError, TypeError, ValidationError):
            raise ModelError(f"'{folder}': its model card does not describe a model that can teach") from None
        if is_own(description.name) or architecture.get("sales"):
            what = f"its model {description.name} is a function of your own, whose code stores would have to run"
            raise ModelError(
                f"'{folder}' cannot teach: {'it needs sales' if architecture.get('sales') else what}. Use the run of "
                "another model"
            )
        return cls(description=description, values=_joined(tensors))

    @classmethod
    def of_setup(cls, setup: Setup, config: RunConfig) -> "TeacherModel | None":
        """The teacher that comes with a setup; None if its run has none.

        Raises:
            RefusedError: it is missing, malformed, or another than the configuration names.
        """
        if config.teacher_digest is None:
            return None
        if setup.teacher_values is None:
            raise RefusedError("the setup comes without the teacher that its configuration names")
        try:
            description = Description.model_validate_json(setup.teacher)
        except ValidationError:
            raise RefusedError("the setup's teacher is not described as we do it") from None
        found = cls(description=description, values=setup.teacher_values)
        if found.digest != config.teacher_digest:
            raise RefusedError("the setup's teacher is not the one that its configuration names")
        return found

    @property
    def text(self) -> str:
        """The description as JSON."""
        return self.description.model_dump_json()

    @property
    def digest(self) -> str:
        """SHA-256 of description and values."""
        return hashlib.sha256(self.text.encode() + self.values.numpy().tobytes()).hexdigest()

    def open(self, labels: Sequence[str], device: torch.device) -> Teacher:
        """Build the teacher.

        Args:
            labels: the student's products, in the order of its outputs.
            device: the device of the training.

        Raises:
            ModelError: its products are others, or its values do not fit it.
        """
        own = self.description
        if is_own(own.name):
            raise ModelError(f"a teacher must be a model by name, and {own.name} is a function")
        if missing := set(labels) ^ set(own.labels):
            only = {"student": missing - set(own.labels), "teacher": missing - set(labels)}
            told = "; ".join(f"only the {who} knows {some(names)}" for who, names in only.items() if names)
            raise ModelError(
                f"teacher and student must know the same products, but {told}. Give the teacher's products with "
                "--catalogue RUN/catalogue.json, or choose another teacher"
            )
        settings = ModelSettings(
            name=own.name, num_classes=len(labels), image_size=own.image_size, norm=own.norm, width=own.width
        )
        module = build(settings, seed=0)
        _load(module, self.values)
        position = {name: row for row, name in enumerate(own.labels)}
        rows = None if tuple(labels) == own.labels else torch.tensor([position[name] for name in labels], device=device)
        normalization = Normalization(mean=own.mean, std=own.std)
        return Teacher(
            module=module.eval().to(device), image_size=own.image_size, normalization=normalization, rows=rows
        )


def teacher_folder(config: RunConfig) -> Path | None:
    """The folder of the model that the run learns from; None if it learns from none.

    Raises:
        UsageError: there is no such run.
    """
    path = config.teacher
    if path is None or config.distill_weight == 0:
        return None
    return model_folder(str(path) if path.exists() else path.name, best=False)


def teacher_of(config: RunConfig) -> TeacherModel | None:
    """Read the run's teacher; None if there is none.

    Raises:
        UsageError: there is no such run, or its model cannot teach.
    """
    folder = teacher_folder(config)
    try:
        if folder is None:
            return None
        found = TeacherModel.read(folder)
        is_for_all = folder == config.teacher
        return replace(found, description=found.description.model_copy(update={"run_id": ""})) if is_for_all else found
    except ModelError as error:
        raise UsageError(f"--teacher {config.teacher}: {error}") from None


def with_teacher(config: RunConfig) -> RunConfig:
    """`config` with the digest of its teacher.

    Raises:
        UsageError: see `teacher_of`.
    """
    teacher = teacher_of(config)
    return config.model_copy(update={"teacher_digest": teacher and teacher.digest})


def problems_with_teacher(config: RunConfig) -> list[str]:
    """What learning from a teacher, or from the stores' models at the server, cannot be combined with."""
    teacher = teacher_of(config)
    if teacher is None:
        return []
    return [*_problems_with_student(config), *_problems_with_privacy(config, teacher.description)]


def own_teacher(folder: Path, sent: TeacherModel, labels: Sequence[str], device: torch.device) -> Teacher | None:
    """The model that a store has chosen at the end of the teacher's run; None if it keeps none of that run.

    Args:
        folder: the folder of the store's model.
        sent: the teacher that the server has sent.
        labels: the student's products.
        device: the device of the training.
    """
    if not sent.description.run_id or not has_model(folder) or sent.description.dp != "none":
        return None
    try:
        found = TeacherModel.read(folder)
        if found.description.run_id != sent.description.run_id:
            return None
        teacher = found.open(labels, device)
    except FedShelfError as error:
        logger.warning("the store's own model does not teach, but the global one: %s", error)
        return None
    return teacher if teacher.image_size == sent.description.image_size else None


def _problems_with_student(config: RunConfig) -> list[str]:
    from fedshelf.app.components import algorithm_of

    wrong = {
        f"--train {config.train}": config.train in ("head", "sales"),
        f"--algorithm {config.algorithm}": algorithm_of(config).sums,
    }
    return [
        f"{flag} with --teacher: a teacher is asked about the views that all layers are trained on. Leave one of the "
        "two out"
        for flag, is_set in wrong.items()
        if is_set
    ]


def _problems_with_privacy(config: RunConfig, teacher: Description) -> list[str]:
    if config.dp in ("none", teacher.dp):
        return []
    return [
        f"--dp {config.dp} with --teacher {config.teacher}: what the teacher says of a photo tells of all photos that "
        f"it was trained on, which the noise of this run does not cover. Use a teacher that was trained with --dp "
        f"{config.dp}"
    ]


def _joined(tensors: dict[str, Tensor]) -> Tensor:
    parts = [tensors[name].float().flatten() for name in sorted(tensors) if tensors[name].is_floating_point()]
    return torch.cat(parts)


def _load(module: nn.Module, values: Tensor) -> None:
    state: dict[str, Any] = module.state_dict()
    names = [name for name in sorted(state) if state[name].is_floating_point()]
    sizes = [state[name].numel() for name in names]
    if sum(sizes) != len(values):
        raise ModelError(f"the teacher's {len(values):,} values do not fit its model, which has {sum(sizes):,}")
    for name, part in zip(names, values.split(sizes), strict=True):
        state[name].copy_(part.view(state[name].shape))
