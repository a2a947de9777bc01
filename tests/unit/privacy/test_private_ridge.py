"""The output layer from sums with noise: what one photo can change, how large the noise is, and what comes out."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedshelf.algorithms.base import Aggregate
from fedshelf.algorithms.ridge import GRAM, MOMENTS, Ridge
from fedshelf.app.components import algorithm_of, offer_of
from fedshelf.app.differential_privacy import problems_with_configuration, with_noise
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import PARAMS, Broadcast, Mechanism, Purpose, TaskKey, Upload
from fedshelf.core.state import ClientState, ModelState
from fedshelf.data.photo_set import PhotoSet
from fedshelf.privacy.accounting import SampledGaussian, compose
from fedshelf.privacy.policy import STRICT
from fedshelf.privacy.private_ridge import MOMENTS_WEIGHT, PrivateRidge
from fedshelf.tracking.queries import run_summary
from tests.unit.simulate.test_private_simulation import run, shown, stores
from tests.worlds import SIZE, bound_model, photos, trainer

__all__ = ["stores"]
CLASSES, HIDDEN = 5, 24
COMMON = photos(1, 30, classes=CLASSES)
QUIET = 1e-7


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def algorithm(noise: float | None, dimensions: int = 7) -> PrivateRidge:
    made = PrivateRidge(exact=Ridge(), dimensions=dimensions, seed=3, noise_multiplier=noise)
    return made.for_model(bound_model(network()).params.layout, "3")


def upload_of(made: PrivateRidge, train: PhotoSet) -> Upload:
    store = trainer("a", bench=bound_model(network()), train=train)
    task = Broadcast(
        key=TaskKey(run_id="r", round=1, attempt=0), purpose=Purpose.TRAIN, client_lr=0.0,
        vectors={PARAMS: store.bound_model.params.shared.clone()},
    )  # fmt: skip
    before = ClientState()
    upload, after = made.client_round(task, before, store)
    assert after is before
    assert {name: len(vector) for name, vector in upload.plain_vectors.items()} == {
        name: spec.size for name, spec in made.vectors(store.bound_model.params.layout).items()
    }
    return upload


def features(train: PhotoSet) -> np.ndarray:
    found: np.ndarray = trainer("a", bench=bound_model(network()), train=train).features(train).astype(np.float64)
    return found


def scaled(upload: Upload, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """All released values, scaled so that each has noise of the same deviation: off A's diagonal, on it, and B."""
    gram, moments = upload.auxiliary[GRAM].double(), upload.auxiliary[MOMENTS].double()
    rows, columns = torch.triu_indices(size, size)
    on = rows == columns
    return gram[~on], gram[on] / math.sqrt(2), moments * MOMENTS_WEIGHT


def test_no_photo_moves_the_released_values_by_more_than_the_noise_is_calibrated_to() -> None:
    made = algorithm(QUIET)
    without, largest = torch.cat(scaled(upload_of(made, COMMON), 7)), 0.0
    draw = np.random.default_rng(3)
    images = [
        np.zeros((SIZE, SIZE, 3)), np.full((SIZE, SIZE, 3), 255), *draw.choice([0, 255], (20, SIZE, SIZE, 3)),
        *COMMON.images[:3],
    ]  # fmt: skip
    for number, image in enumerate(images):
        train = PhotoSet(
            np.concatenate([COMMON.images, image[None].astype(np.uint8)]),
            np.concatenate([COMMON.labels, [number % CLASSES]]),
        )
        largest = max(largest, float((torch.cat(scaled(upload_of(made, train), 7)) - without).norm()))
    assert largest == pytest.approx(math.sqrt(0.5 + MOMENTS_WEIGHT**2), abs=1e-4)  # it is reached, and not exceeded


def test_the_noise_has_the_deviation_that_the_accounting_assumes() -> None:
    size, quiet = HIDDEN, scaled(upload_of(algorithm(QUIET, HIDDEN), COMMON), HIDDEN)
    loud = [scaled(upload_of(algorithm(3.0, size), COMMON), size) for _ in range(40)]
    for number, without in enumerate(quiet):  # the diagonal alone has few values
        noise = torch.cat([each[number] - without for each in loud])
        bound = 3.0 * math.sqrt(0.5 + MOMENTS_WEIGHT**2)
        error = 5 / math.sqrt(2 * len(noise))
        assert float(noise.std()) / bound == pytest.approx(1.0, abs=error)
        assert abs(float(noise.mean())) < 5 * bound / math.sqrt(len(noise))


def test_each_upload_has_noise_of_its_own_whatever_the_seed() -> None:
    one, other = (upload_of(algorithm(1.0), COMMON).auxiliary[GRAM] for _ in range(2))
    assert not torch.allclose(one, other, atol=1e-2)


def test_without_noise_no_sums_are_sent() -> None:
    with pytest.raises(RefusedError, match="not sent without noise"):
        upload_of(algorithm(None), COMMON)


def test_a_photo_whose_features_are_not_finite_changes_nothing() -> None:
    made, labels = algorithm(QUIET), np.array([0, 1, 2])
    good = features(COMMON)[:3].astype(np.float32)
    bad = np.concatenate([good, np.full((1, HIDDEN), np.nan, np.float32), np.full((1, HIDDEN), np.inf, np.float32)])
    one, other = made._noisy_sums(good, labels, QUIET), made._noisy_sums(bad, np.array([0, 1, 2, 3, 4]), QUIET)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dimensions", [7, 2 * HIDDEN], ids=["projected", "all"])
def test_with_hardly_any_noise_the_head_is_that_of_ridge_regression_on_all_photos(dimensions: int) -> None:
    made = replace(algorithm(QUIET, dimensions), exact=replace(algorithm(None).exact, ridge_lambda=0.01))
    parts = [COMMON.images[:11], COMMON.images[11:]], [COMMON.labels[:11], COMMON.labels[11:]]
    uploads = [upload_of(made, PhotoSet(*part)) for part in zip(*parts, strict=True)]
    means = {name: (uploads[0].auxiliary[name] + uploads[1].auxiliary[name]) / 2 for name in (GRAM, MOMENTS)}
    bound = bound_model(network())
    aggregate = Aggregate(delta=torch.zeros(0), auxiliary=means, num_clients=2, num_trainable=0)
    state = made.server_update(ModelState(params=bound.params.shared.clone()), aggregate, 2)

    given = features(COMMON)
    projection = made._projected(torch.eye(HIDDEN, dtype=torch.float64)).numpy()
    inputs = given @ projection
    inputs /= np.linalg.norm(inputs, axis=1, keepdims=True)
    penalty = math.sqrt(0.01 * (inputs**2).sum() / inputs.shape[1])
    stacked = np.concatenate([inputs, penalty * np.eye(inputs.shape[1])])
    targets = np.concatenate([np.eye(CLASSES)[COMMON.labels], np.zeros((inputs.shape[1], CLASSES))])
    wanted = projection @ np.linalg.lstsq(stacked, targets, rcond=None)[0]
    bound.load(state.params)
    layer = bound.module.get_submodule("3")
    assert isinstance(layer, nn.Linear)
    assert not layer.bias.any()
    scores, expected = given @ layer.weight.detach().double().numpy().T, given @ wanted
    np.testing.assert_allclose(scores, expected, rtol=0, atol=2e-3 * np.abs(expected).max())


@pytest.mark.usefixtures("stores")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_releases_the_sums_once_and_says_so(workers: int) -> None:
    directory = run(
        "run", dp="sample", noise_multiplier=2.0, algorithm="ridge", train="head", rounds=1, workers=workers,
        projection=8,
    )  # fmt: skip
    privacy, summary = shown(directory), run_summary(directory.path)
    one = SampledGaussian(noise_multiplier=2.0, sampling_rate=1.0, steps=1)
    assert privacy["epsilon"] == pytest.approx(compose([one], 1e-5).epsilon)
    assert {each["client"]: each["releases"] for each in privacy["releases"]} == {"lyon": 1, "oslo": 1, "rome": 1}
    assert [(record.train_loss, record.accuracy) for record in summary.rounds] == [(None, None)]
    assert summary.rounds[0].central_accuracy is not None


def configured(**values: Any) -> RunConfig:
    given = {"data_dir": Path(), "algorithm": "ridge", "train": "head", "dp": "sample", "rounds": 1, "norm": "group"}
    return RunConfig(**{**given, "noise_multiplier": 1.0, **values})


def test_a_second_round_and_noise_at_the_server_are_refused() -> None:
    assert problems_with_configuration(configured()) == []
    [problem] = problems_with_configuration(configured(rounds=2))
    assert problem.endswith("Use --rounds 1")
    [problem] = problems_with_configuration(configured(dp="client"))
    assert problem.startswith("--algorithm ridge with --dp client:")


def test_the_store_sets_the_noise_and_other_algorithms_stay_as_they_are() -> None:
    mechanism = Mechanism(noise_multiplier=4.0, sampling_rate=1.0, steps=1)
    private, plain = algorithm_of(configured()), algorithm_of(configured(dp="none", noise_multiplier=None))
    assert isinstance(private, PrivateRidge)
    assert private.noise_multiplier is None
    found = with_noise(private, mechanism)
    assert isinstance(found, PrivateRidge)
    assert found.noise_multiplier == 4.0
    assert with_noise(plain, mechanism) is plain


def test_a_policy_without_sums_over_photos_allows_those_with_noise() -> None:
    given: dict[str, Any] = {
        "model": "resnet18", "image_size": 64, "threads": 1, "epochs": 1, "weighs_examples": False,
    }  # fmt: skip
    offer = offer_of(configured(noise_multiplier=None, target_epsilon=4.0))
    STRICT.check_setup(**given, offer=offer, sums=algorithm_of(configured()).counts_photos)
