"""Augmentation against PyTorch's own affine grid and against arithmetic done by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedshelf.data.augmentation import Augmentation, augment, normalize

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
STILL = Augmentation(crop_scale=(1.0, 1.0), flip=False, rotation_degrees=0, brightness=0, contrast=0)


def batch(size: int = 16, count: int = 6) -> Tensor:
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 255
    return functional.interpolate(coarse, size=(size, size), mode="bilinear").to(torch.uint8).permute(0, 2, 3, 1)


def view(images: Tensor, settings: Augmentation, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return augment(images, settings=settings, generator=generator, device=CPU, mean=MEAN, std=STD)


def by_hand(images: Tensor) -> Tensor:
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (images.permute(0, 3, 1, 2) / 255 - mean) / std


def test_normalize_is_the_textbook_formula_in_channels_last() -> None:
    images = batch().contiguous()
    result = normalize(images, CPU, MEAN, STD)
    torch.testing.assert_close(result, by_hand(images), atol=1e-5, rtol=0)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_with_all_effects_off_the_view_is_the_normalized_photo() -> None:
    result = view(batch(), STILL)
    torch.testing.assert_close(result, by_hand(batch()), atol=1e-3, rtol=0)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_the_photos_are_not_changed() -> None:
    images = batch()
    before = images.clone()
    view(images, Augmentation())
    assert torch.equal(images, before)


def test_crop_flip_and_rotation_are_the_affine_map_they_claim_to_be() -> None:
    settings = Augmentation(brightness=0, contrast=0)
    draws = torch.rand(6, 7, generator=torch.Generator().manual_seed(5))
    side = (0.6 + 0.4 * draws[:, 0]).sqrt()
    angle = (2 * draws[:, 4] - 1) * math.radians(13)
    sign = torch.where(draws[:, 3] < 0.5, -1.0, 1.0)
    zero = torch.zeros(6)
    scale = torch.stack([torch.stack([side, zero], 1), torch.stack([zero, side], 1)], 1)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()], 1), torch.stack([angle.sin(), angle.cos()], 1)], 1)
    mirror = torch.stack([torch.stack([sign, zero], 1), torch.stack([zero, zero + 1], 1)], 1)
    shift = (1 - side).unsqueeze(1) * (2 * draws[:, 1:3] - 1)
    theta = torch.cat([scale @ turn @ mirror, shift.unsqueeze(2)], 2)
    photos = batch().permute(0, 3, 1, 2).float()
    grid = functional.affine_grid(theta, list(photos.shape), align_corners=False)
    expected = functional.grid_sample(photos, grid, padding_mode="border", align_corners=False)
    result = view(batch(), settings, seed=5)
    torch.testing.assert_close(result, by_hand(expected.permute(0, 2, 3, 1)), atol=1e-3, rtol=0)
    assert {-1.0, 1.0} == set(sign.tolist())


def test_a_mirrored_view_is_the_photo_mirrored_and_about_half_are() -> None:
    settings = Augmentation(crop_scale=(1.0, 1.0), rotation_degrees=0, brightness=0, contrast=0)
    images = batch(count=1).expand(400, -1, -1, -1)
    views = view(images, settings)
    plain = by_hand(images[:1])
    is_plain = ((views - plain).abs().amax((1, 2, 3)) < 1e-3).sum().item()
    is_mirrored = ((views - plain.flip(3)).abs().amax((1, 2, 3)) < 1e-3).sum().item()
    assert is_plain + is_mirrored == 400
    assert 140 < is_plain < 260


def test_brightness_and_contrast_stay_in_their_range_and_keep_the_pivot() -> None:
    views = view(batch(count=1).expand(200, -1, -1, -1), Augmentation(
        crop_scale=(1.0, 1.0), flip=False, rotation_degrees=0, brightness=0.2, contrast=0.3
    ))  # fmt: skip
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    values = views * std + mean
    photo = batch(count=1).permute(0, 3, 1, 2) / 255
    brightness = values.mean((1, 2, 3)) / photo.mean()
    contrast = values.std((1, 2, 3)) / photo.std() / brightness
    for factor, reach in ((brightness, 0.2), (contrast, 0.3)):
        assert 1 - reach - 1e-3 < factor.min() < 1 - 0.8 * reach
        assert 1 + 0.8 * reach < factor.max() < 1 + reach + 1e-3


def test_the_same_generator_state_gives_the_same_bits_and_another_gives_others() -> None:
    assert torch.equal(view(batch(), Augmentation(), seed=3), view(batch(), Augmentation(), seed=3))
    assert not torch.equal(view(batch(), Augmentation(), seed=3), view(batch(), Augmentation(), seed=4))


@pytest.mark.parametrize("settings", [STILL, Augmentation(), Augmentation(flip=False)])
def test_every_batch_draws_the_same_number_of_values_whatever_the_settings(settings: Augmentation) -> None:
    generator = torch.Generator().manual_seed(0)
    augment(batch(), settings=settings, generator=generator, device=CPU, mean=MEAN, std=STD)
    other = torch.Generator().manual_seed(0)
    torch.rand(6, 7, generator=other)
    assert torch.equal(torch.rand(4, generator=generator), torch.rand(4, generator=other))


@pytest.mark.parametrize(
    "settings",
    [{"crop_scale": (0.0, 1.0)}, {"crop_scale": (0.9, 0.5)}, {"crop_scale": (0.5, 1.5)}, {"brightness": 1.0},
     {"contrast": -0.1}, {"rotation_degrees": -1.0}],
)  # fmt: skip
def test_senseless_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"crop_scale|brightness"):
        Augmentation(**settings)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_sees_the_same_views() -> None:
    generator = torch.Generator().manual_seed(0)
    on_gpu = augment(
        batch(), settings=Augmentation(), generator=generator, device=torch.device("cuda"), mean=MEAN, std=STD
    )
    torch.testing.assert_close(on_gpu.cpu(), view(batch(), Augmentation()), atol=1e-3, rtol=0)
