"""Assembles the work of one client from a setup and its photos."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from fedshelf.algorithms.base import Asynchronous
from fedshelf.app.components import client_lr_of, clip_of
from fedshelf.app.differential_privacy import private, tells_of_validation, with_noise
from fedshelf.app.photos import StorePhotos
from fedshelf.app.setup import OpenedSetup
from fedshelf.config import files
from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import Comparison, Ready
from fedshelf.core.rng import Rng
from fedshelf.data.photo_set import PhotoSet
from fedshelf.personalization.alone import ClosedForm
from fedshelf.personalization.model_selection import ModelSelection
from fedshelf.privacy.budget import NO_BUDGET, Budget
from fedshelf.privacy.withholding import only_noised
from fedshelf.rounds.client import Work
from fedshelf.training.batch_size import lr_scale
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.distillation import Teacher
from fedshelf.training.loop import Run, alone
from fedshelf.training.own_training import OwnTraining
from fedshelf.training.trainer import Trainer

SaveModel = Callable[[OpenedSetup, StorePhotos, BoundModel, Comparison], None]
"""Saves the model that a store has chosen, which is in the bound model."""


def work_for(
    client: str, opened: OpenedSetup, photos: StorePhotos, *, batch_size: int | None = None, training: Run = alone,
    features_folder: Path | None = None,
    test: Callable[[], PhotoSet | None] = lambda: None,
    save: SaveModel = lambda opened, photos, bound, comparison: None,
    per_product: bool = True, budget: Budget = NO_BUDGET, teacher: Teacher | None = None,
) -> Work:  # fmt: skip
    """Create the work of one client.

    Args:
        client: the client's name.
        opened: the setup's objects.
        photos: the client's photos.
        batch_size: batch size, if clients have their own; None measures the fastest.
        training: trains the model.
        features_folder: folder in which features of photos are kept; None keeps none.
        test: returns the test photos on which models are compared at the end.
        save: saves the model that the client chooses then.
        per_product: whether the client counts by product, if it is asked to.
        budget: the store's privacy budget.
        teacher: the store's own model to learn from; None: the one that the server has sent, if any.

    Returns:
        The work.

    Raises:
        RefusedError: the teacher cannot be asked in this training; or see `private`.
    """
    bound, growth, scale = opened.bound_model, 1, 1.0
    if opened.batch_sizes is not None:
        size = batch_size or opened.batch_sizes.best_for(photos.train)
        growth, scale = size // bound.settings.batch_size, lr_scale(bound.settings, size)
        bound = replace(bound, settings=replace(bound.settings, batch_size=size))
    trainer = Trainer(
        bound_model=bound, client=client, rng=Rng(opened.config.seed), train=photos.train,
        validation=photos.validation, num_classes=len(opened.catalogue), phases=opened.personalization.phases,
        renews=isinstance(opened.algorithm, Asynchronous), growth=growth, lr_scale=scale,
        run=training,
        features_folder=features_folder, teacher=teacher or opened.teacher,
    )  # fmt: skip
    if trainer.teacher is not None:
        _check_teacher(trainer, trainer.teacher)
    local_trainer = trainer
    trainer, mechanism = private(trainer, opened.config, run_id=opened.setup.run_id, budget=budget)
    ready = Ready(
        run_id=opened.setup.run_id,
        layout_digest=opened.bound_model.params.layout.digest,
        catalogue_digest=opened.catalogue.digest,
        config_digest=files.digest(opened.setup.config),
        num_train=len(photos.train),
        num_validation=len(photos.validation),
        num_left_out=photos.num_left_out,
    )
    return Work(
        algorithm=with_noise(opened.algorithm, mechanism),
        closed_form=opened.closed_form,
        trainer=trainer,
        ready=ready if tells_of_validation(opened.config) else only_noised(ready),
        uploads=opened.uploads,
        mechanism=mechanism,
        local_trainer=local_trainer,
        is_masked=opened.uploads.is_masked,
        clip=clip_of(opened.config),
        personalization=opened.personalization,
        catalogue=opened.catalogue if per_product else None,
        model_selection=ModelSelection(
            client_lr=client_lr_of(opened.config), test=test, save=partial(save, opened, photos),
            closed_form=_closed_form_alone(opened),
        ),
    )  # fmt: skip


def _check_teacher(trainer: Trainer, teacher: Teacher) -> None:
    if isinstance(trainer.run, OwnTraining):
        raise RefusedError("--teacher with a function for local training: it would not ask the teacher")
    photos = trainer.train
    if len(photos) and photos.teacher_images is None and photos.images.shape[1] != teacher.image_size:
        raise RefusedError(
            f"--teacher sees photos of {teacher.image_size} pixels, and photos in memory have one size. Use folders of "
            f"photos, or --image-size {teacher.image_size}"
        )


def _closed_form_alone(opened: OpenedSetup) -> ClosedForm | None:
    """What a store does alone, where the run computes the output layer in closed form."""
    if opened.algorithm.sums:
        return ClosedForm(solve=opened.algorithm.solve_alone, at_first=True, at_last=False, trains=False)
    if opened.closed_form is None:
        return None
    return ClosedForm(
        solve=opened.closed_form.solve_alone, at_first=opened.config.warm_start != "none",
        at_last=opened.config.refit_head, trains=True,
    )  # fmt: skip
