"""Features of photos: computed once, kept on disk, the same bits either way."""

import math
import os
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedshelf.core.rng import Rng
from fedshelf.data.augmentation import Augmentation
from fedshelf.data.photo_set import PhotoSet
from fedshelf.models.resnet import resnet10
from fedshelf.models.trainable import frozen_names
from fedshelf.training.bound_model import BoundModel, TrainingSettings
from fedshelf.training.device import choose
from fedshelf.training.features import featurized
from fedshelf.training.trainer import Trainer, evaluate


def bound_model(seed: int = 0, augmentation: Augmentation | None = Augmentation()) -> BoundModel:  # noqa: B008
    torch.manual_seed(seed)
    module = resnet10(4, width=8)
    return BoundModel.of(
        module, compute=choose("cpu", threads=1), settings=TrainingSettings(batch_size=4, augmentation=augmentation),
        frozen_names=frozen_names(module, "head", freeze_norm=False), on_features=True,
    )  # fmt: skip


def photos(count: int = 21) -> PhotoSet:
    rng = np.random.default_rng(0)
    return PhotoSet(rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8), np.arange(count) % 4)


def trained(bound: BoundModel, on: PhotoSet) -> torch.Tensor:
    start = bound.params.shared.clone()
    trainer = Trainer(bound_model=bound, client="a", rng=Rng(1), train=on, validation=on)
    trainer.fit(round=1, client_lr=0.1)
    found = bound.params.shared.clone()
    bound.load(start)
    return found


@pytest.mark.parametrize("views", [1, 3])
def test_cached_and_uncached_training_give_the_same_bits(tmp_path: Path, views: int) -> None:
    bound, given = bound_model(), photos()
    uncached = featurized(bound, given, cache=None, views=views)
    first = featurized(bound, given, cache=tmp_path, views=views)
    again = featurized(bound_model(), given, cache=tmp_path, views=views)
    assert uncached.images.shape == (21, views, 64)
    assert np.array_equal(uncached.images, first.images)
    assert np.array_equal(uncached.images, again.images)
    assert torch.equal(trained(bound, uncached), trained(bound, again))


def test_features_are_computed_in_float32_where_training_runs_in_bfloat16(tmp_path: Path) -> None:
    bound, given = bound_model(), photos()
    on_gpu = replace(bound, compute=replace(bound.compute, autocast=True))
    expected = featurized(bound, given, cache=tmp_path, views=2).images
    assert np.array_equal(featurized(on_gpu, given, cache=None, views=2).images, expected)
    assert trained(on_gpu, featurized(on_gpu, given, cache=tmp_path, views=2)).isfinite().all()


def test_features_of_a_photo_do_not_depend_on_the_others(tmp_path: Path) -> None:
    bound, given = bound_model(), photos()
    every = featurized(bound, given, cache=None, views=2)
    some = PhotoSet(given.images[[17, 3, 3]], given.labels[[17, 3, 3]])
    assert np.array_equal(featurized(bound, some, cache=None, views=2).images, every.images[[17, 3, 3]])


def test_a_photo_more_is_all_that_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound, given = bound_model(), photos()
    featurized(bound, PhotoSet(given.images[:20], given.labels[:20]), cache=tmp_path)
    passes: list[torch.Tensor] = []
    compute = BoundModel.features

    def noted(bound: BoundModel, batch: torch.Tensor) -> torch.Tensor:
        passes.append(batch)
        return compute(bound, batch)

    monkeypatch.setattr(BoundModel, "features", noted)
    featurized(bound, given, cache=tmp_path)
    assert len(passes) == 1
    assert not passes[0][1:].any(), "one photo, and nothing to fill the batch with"


def test_another_backbone_or_other_views_are_computed_anew(tmp_path: Path) -> None:
    given = photos()
    featurized(bound_model(), given, cache=tmp_path, views=2)
    expected = featurized(bound_model(seed=1), given, cache=None, views=2)
    assert np.array_equal(featurized(bound_model(seed=1), given, cache=tmp_path, views=2).images, expected.images)
    others = bound_model(augmentation=Augmentation(flip=False))
    assert np.array_equal(
        featurized(others, given, cache=tmp_path, views=2).images, featurized(others, given, cache=None, views=2).images
    )


def test_the_first_view_is_the_photo_as_it_is_evaluated() -> None:
    bound, given = bound_model(), photos()
    found = featurized(bound, given, cache=None, views=2)
    assert evaluate(bound, found).num_correct == evaluate(bound, given).num_correct
    assert evaluate(bound, found).loss_sum == pytest.approx(evaluate(bound, given).loss_sum, rel=1e-5)
    assert not np.array_equal(found.images[:, 0], found.images[:, 1])
    plain = bound_model(augmentation=None)
    without = featurized(plain, given, cache=None, views=2)
    assert np.array_equal(without.images[:, 0], without.images[:, 1])


def test_the_cache_is_the_owners_alone_and_may_be_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bound, given = bound_model(), photos()
    expected = featurized(bound, given, cache=tmp_path / "features")
    (file,) = (tmp_path / "features").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    file.write_bytes(os.urandom(9000))
    assert np.array_equal(featurized(bound, given, cache=tmp_path / "features").images, expected.images)
    assert "computed again" in caplog.text
    caplog.clear()
    assert np.array_equal(featurized(bound, given, cache=tmp_path / "features").images, expected.images)
    assert not caplog.text


def test_no_photos_have_no_features() -> None:
    assert featurized(bound_model(), photos(0), cache=None, views=3).images.shape == (0, 3, 64)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_photo_whose_features_are_not_finite_is_no_reason_to_fail(value: float) -> None:
    """Whoever makes the weights would learn from it what is in single photos."""
    bound = bound_model()
    bound.params.vector.fill_(value)
    assert not bound.features(torch.ones(2, 3, 16, 16)).isfinite().all()
