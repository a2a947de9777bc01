"""What one photo can change in all that leaves a store under --dp sample: the worst photos that a search finds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedshelf.algorithms.base import Algorithm
from fedshelf.algorithms.fedavg import FedAvg
from fedshelf.algorithms.fedprox import FedProx
from fedshelf.algorithms.scaffold import CONTROL_VARIATE, Scaffold
from fedshelf.core.messages import PARAMS, Broadcast, Purpose, TaskKey, Upload, Vector, auxiliary_vectors
from fedshelf.core.state import ClientState
from fedshelf.data.photo_set import PhotoSet
from fedshelf.privacy.dp_sgd import Clipping, PrivateTraining, poisson
from fedshelf.privacy.withholding import only_noised
from fedshelf.training.trainer import Trainer
from tests.worlds import PLAIN, SIZE, bound_model, photos, trainer

CLIP, LR, BATCH = 0.3, 0.05, 16
COMMON = photos(1, 9)


def group_norm() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * SIZE * SIZE, 3)
    )


def private_trainer(train: PhotoSet, clipping: Clipping) -> Trainer:
    """A trainer that takes one step with all photos, and hardly any noise."""
    bench = bound_model(group_norm(), replace(PLAIN, batch_size=BATCH))
    training = PrivateTraining(noise_multiplier=1e-9, clip_norm=CLIP, clipping=clipping, key=bytes(32))
    made = trainer("a", bench=bench, train=train)
    return replace(made, run=training, draw=poisson, is_private=True)


def upload_of(algorithm: Algorithm, train: PhotoSet, clipping: Clipping) -> Upload:
    made = private_trainer(train, clipping)
    params = made.bound_model.params.shared.clone()
    vectors: dict[str, Vector] = {PARAMS: params}
    if algorithm.auxiliary:
        vectors |= auxiliary_vectors({CONTROL_VARIATE: torch.zeros(made.bound_model.params.layout.num_trainable)})
    task = Broadcast(
        key=TaskKey(run_id="r", round=1, attempt=0), purpose=Purpose.TRAIN, client_lr=LR, vectors=vectors
    )  # fmt: skip
    upload, _ = algorithm.client_round(task, ClientState(), made)
    return only_noised(upload)


def with_photo(image: np.ndarray, label: int) -> PhotoSet:
    return PhotoSet(
        np.concatenate([COMMON.images, image[None].astype(np.uint8)]), np.concatenate([COMMON.labels, [label]])
    )


def candidates() -> list[PhotoSet]:
    """The photos plus one: extreme images, noise, and the photos themselves, under every label."""
    draw = np.random.default_rng(3)
    images = [
        np.zeros((SIZE, SIZE, 3)), np.full((SIZE, SIZE, 3), 255), np.indices((SIZE, SIZE, 3)).sum(0) % 2 * 255,
        *draw.integers(0, 256, (4, SIZE, SIZE, 3)), *draw.choice([0, 255], (4, SIZE, SIZE, 3)), *COMMON.images[:2],
    ]  # fmt: skip
    return [with_photo(image, label) for image in images for label in range(3)]


@pytest.mark.parametrize("clipping", ["flat", "layer", "automatic"])
@pytest.mark.parametrize("algorithm", [FedAvg(), FedProx(mu=0.1), Scaffold()], ids=lambda each: type(each).__name__)
def test_a_photo_moves_an_upload_by_no_more_than_its_bound(algorithm: Algorithm, clipping: Clipping) -> None:
    without = upload_of(algorithm, COMMON, clipping)
    largest = dict.fromkeys(without.vectors, 0.0)
    for photo_set in candidates():
        upload = upload_of(algorithm, photo_set, clipping)
        for name, vector in upload.plain_vectors.items():
            moved = float((vector.double() - without.plain_vectors[name].double()).norm())
            largest[name] = max(largest[name], moved)
        assert (upload.train_loss, upload.num_steps) == (None, without.num_steps)
        assert upload.batch_size == without.batch_size
        assert upload.client_lr == without.client_lr
    bounds = {name: CLIP / BATCH * (LR if name == "delta" else 1.0) for name in largest}
    for name, moved in largest.items():
        assert moved <= bounds[name] * (1 + 1e-3)
        assert moved > 0.5 * bounds[name]  # the search comes close to the bound
