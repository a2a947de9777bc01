"""The ways of training that an audit attacks: a run's own and the probe's, with protection and without."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedshelf.app.audit.subject import AuditSubject
from fedshelf.app.components import encryption_of, protection_of
from fedshelf.app.differential_privacy import noise_for, private
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import FedShelfError
from fedshelf.core.messages import Upload
from fedshelf.core.rng import Rng
from fedshelf.core.state import ClientState
from fedshelf.data.photo_set import PhotoSet
from fedshelf.privacy.audit.findings import ModelRole
from fedshelf.privacy.audit.probe import SIZE, probe_model
from fedshelf.privacy.audit.step_update import Seal
from fedshelf.privacy.clipping import Clip
from fedshelf.privacy.dp_sgd import PrivateTraining, SampleDP, poisson
from fedshelf.rounds.pipeline import UploadPipeline
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.trainer import Trainer

EPSILON = 8.0  # of the protection that a run without --dp sample is compared with
CLIP_NORM = 1.0
PROBE_CLIP = 0.01  # bounds the probe's updates, which are larger


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """A way to train, and what it sends.

    Attributes:
        model: the model.
        protection: what is done to updates, in words.
        trainer: trains.
        shared: [S]: the model that it starts from.
        noise: noise multiplier; None without noise.
        seal: what becomes of an upload on its way.
    """

    model: ModelRole
    protection: str
    trainer: Trainer
    shared: Tensor
    noise: float | None = None
    seal: Seal = lambda upload: upload

    @property
    def bound(self) -> BoundModel:
        """The model, bound."""
        return self.trainer.bound_model


def targets_of_run(subject: AuditSubject, left_out: list[str]) -> Iterator[Target]:
    """The run's own training: without protection, as it is sent, and with noise if it has none.

    Args:
        subject: the store's photos, model and settings.
        left_out: gets what cannot be attacked, with the reason.
    """
    opened, work, config = subject.opened, subject.work, subject.opened.config
    if opened.algorithm.sums:
        left_out.append(
            f"The run's own uploads: --algorithm {config.algorithm} sends sums over all photos instead of gradients. "
            "Without --dp sample, they hold the number of photos of each product, and the features of a product's only "
            "photo."
        )
        return
    plain = work.local_trainer or work.trainer
    yield Target(model="run", protection="none", trainer=plain, shared=subject.shared)
    summed = (opened.uploads.summand,)  # rounds, which hides nothing
    stages = tuple(stage for stage in opened.uploads.stages if not stage.declares.masks and stage not in summed)
    hiding = [stage.declares.setting for stage in opened.uploads.stages if stage.declares.masks]
    clear = ", but for the change of the layers before the output layer, which is not encrypted" * (
        encryption_of(config).is_on and encryption_of(config).scope == "head"
    )
    left_out += [
        f"{setting}: the server sees no upload by itself{clear}. The rows for the run's own model are those of an "
        "upload that is not hidden; what a sum gives away is tried on the probe."
        for setting in hiding
    ]
    noise = work.mechanism.noise_multiplier if work.mechanism is not None else None
    if stages or noise is not None:
        pipeline, layout = UploadPipeline(stages=stages), opened.bound_model.params.layout

        def seal(upload: Upload) -> Upload:
            sealed, _ = pipeline.seal(
                upload, client=subject.store, before=ClientState(), after=ClientState(), layout=layout
            )  # fmt: skip
            return pipeline.open(sealed, layout)

        said = [] if noise is None else [f"--dp sample, noise {noise:.3g}"]
        said += [stage.declares.setting for stage in stages]
        yield Target(
            model="run", protection=f"as sent: {', '.join(said)}", trainer=work.trainer, shared=subject.shared,
            noise=noise, seal=seal,
        )  # fmt: skip
    if noise is None:
        try:
            trainer, mechanism = private(plain, _with_noise(config), run_id=opened.setup.run_id)
        except FedShelfError as error:
            left_out.append(f"The run's own model with noise: {error}.")
        else:
            found = None if mechanism is None else mechanism.noise_multiplier
            yield Target(
                model="run", protection=_said(found), trainer=trainer, shared=subject.shared, noise=found
            )  # fmt: skip
    if config.dp == "client":
        left_out.append("--dp client: its noise protects the published model. The server sees uploads without it.")


def targets_of_probe(subject: AuditSubject, left_out: list[str]) -> list[Target]:
    """The probe's training on the store's photos, without protection and with the run's noise.

    Args:
        subject: the store's photos, model and settings.
        left_out: gets what cannot be attacked, with the reason.
    """
    config, photos = subject.opened.config, _shrunk(subject.pixels, SIZE)
    bound = probe_model(len(subject.opened.catalogue), size=photos.images.shape[1])
    settings = replace(bound.settings, batch_size=config.batch_size, local_epochs=config.local_epochs)
    bound = replace(bound, settings=settings)
    shared = bound.params.shared.clone()
    trainer = Trainer(
        bound_model=bound, client=subject.store, rng=Rng(config.seed), train=photos,
        validation=PhotoSet(photos.images[:0], photos.labels[:0]), num_classes=len(subject.opened.catalogue),
    )  # fmt: skip
    clip, layout = Clip(max_norm=PROBE_CLIP), bound.params.layout
    targets = [
        Target(model="probe", protection="none", trainer=trainer, shared=shared),
        Target(
            model="probe", protection=f"{clip.declares.setting}, no noise", trainer=trainer, shared=shared,
            seal=lambda upload: clip.seal(upload, None, client=subject.store, layout=layout)[0],
        ),
    ]  # fmt: skip
    given = config.model_copy(update={"algorithm": "fedavg"}) if subject.opened.algorithm.sums else config
    noisy = given if isinstance(protection_of(given), SampleDP) else _with_noise(given)
    protection = protection_of(noisy)
    try:
        noise = noise_for(noisy, protection, len(photos)) if isinstance(protection, SampleDP) else None
    except FedShelfError as error:
        left_out.append(f"Noise of --dp sample: {error}.")
        noise = None
    if noise is not None and isinstance(protection, SampleDP):
        training = PrivateTraining(
            noise_multiplier=noise, clip_norm=protection.clip_norm, clipping=protection.clipping
        )  # fmt: skip
        private_trainer = replace(trainer, run=training, draw=poisson, is_private=True)
        said = f"--dp sample, noise {noise:.3g}" if noisy is given else _said(noise)
        targets.append(
            Target(model="probe", protection=said, trainer=private_trainer, shared=shared, noise=noise)
        )  # fmt: skip
    return targets


def _with_noise(config: RunConfig) -> RunConfig:
    """The configuration with the protection that a run without one is compared with."""
    return config.model_copy(
        update={"dp": "sample", "target_epsilon": EPSILON, "noise_multiplier": None, "clip_norm": CLIP_NORM}
    )


def _said(noise: float | None) -> str:
    return f"--dp sample, ε = {EPSILON:g} over all rounds (noise {noise or 0:.3g})"


def _shrunk(photos: PhotoSet, size: int) -> PhotoSet:
    """Photos of at most `size` pixels a side."""
    if photos.images.shape[1] <= size:
        return photos
    pixels = torch.from_numpy(photos.images.copy()).permute(0, 3, 1, 2).float()
    small = F.interpolate(pixels, size=(size, size), mode="area").round().to(torch.uint8)
    return PhotoSet(np.ascontiguousarray(small.permute(0, 2, 3, 1).numpy()), photos.labels)
