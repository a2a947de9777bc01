"""Random views of photos, computed on whole batches.

Crop, flip and rotation are one affine map per photo and one bilinear resampling; brightness, contrast and normalization
are one multiplication and addition per value.

All randomness is drawn on a CPU generator, always `_DRAWS` numbers per photo for any settings, so that all devices see
the same views and switching one effect off changes no other.

Shapes: B photos, H = W pixels a side. Pixel values are 0 to 255; `mean` and `std` are per channel on the scale 0 to
1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

_DRAWS = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """How far views may differ from their photo.

    Attributes:
        crop_scale: range of the share of the photo's area that a view shows (uniform), aspect ratio kept.
        flip: whether half of the views are mirrored left to right.
        rotation_degrees: largest rotation in either direction.
        brightness: values are multiplied by up to 1 ± this.
        contrast: differences from the photo's mean are multiplied by up to 1 ± this.
    """

    crop_scale: tuple[float, float] = (0.6, 1.0)
    flip: bool = True
    rotation_degrees: float = 13.0
    brightness: float = 0.4
    contrast: float = 0.4

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale is {self.crop_scale}: give shares of the area with 0 < least <= largest <= 1")
        if not (0 <= self.brightness < 1 and 0 <= self.contrast < 1 and self.rotation_degrees >= 0):
            raise ValueError("brightness and contrast must lie in [0, 1), rotation_degrees must not be negative")


def augment(
    images_BHWC: Tensor,
    *,
    settings: Augmentation,
    generator: torch.Generator,
    device: torch.device,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Compute one random view of each photo, normalized.

    Values are not clipped to black and white after the change of brightness and contrast. Beyond the photo's edge, a
    rotated view repeats the edge.

    Args:
        images_BHWC: uint8 on the CPU.
        settings: strength of the effects.
        generator: on the CPU; advances by the same number of draws for every batch of B photos.
        device: device of the result.
        mean: per channel.
        std: per channel.

    Returns:
        float32 [B, 3, H, W], channels_last, on `device`; bit for bit the same for the same generator state, thread
        count and device.
    """
    draws = torch.rand(len(images_BHWC), _DRAWS, generator=generator).unbind(1)
    grid_BHW2 = _grid(settings, *draws[:5], size=images_BHWC.shape[1]).to(device)
    brightness_B = (1 + settings.brightness * (2 * draws[5] - 1)).to(device)
    contrast_B = (1 + settings.contrast * (2 * draws[6] - 1)).to(device)
    images_BCHW = images_BHWC.to(device).permute(0, 3, 1, 2).to(torch.float32)
    views_BCHW = functional.grid_sample(images_BCHW, grid_BHW2, padding_mode="border", align_corners=False)
    pivot_B = views_BCHW.mean((1, 2, 3)) * brightness_B
    # ((x·b − p)·c + p) / 255, normalized, as x · scale + shift
    mean_1C11, std_1C11 = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (mean, std))
    scale_BC11 = (brightness_B * contrast_B / 255).view(-1, 1, 1, 1) / std_1C11
    shift_BC11 = ((pivot_B * (1 - contrast_B) / 255).view(-1, 1, 1, 1) - mean_1C11) / std_1C11
    out_BCHW = torch.empty_like(views_BCHW, memory_format=torch.channels_last)
    return torch.addcmul(shift_BC11, views_BCHW, scale_BC11, out=out_BCHW)


def normalize(images_BHWC: Tensor, device: torch.device, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalize photos without augmentation, for evaluation: float32 [B, 3, H, W], channels_last, on `device`.

    Args:
        images_BHWC: uint8 on the CPU.
        device: device of the result.
        mean: per channel.
        std: per channel.
    """
    batch, height, width, channels = images_BHWC.shape
    shift_R, scale_R = _row_constants(width, device, tuple(mean), tuple(std))
    rows_BHR = images_BHWC.to(device).reshape(batch, height, width * channels).to(torch.float32)
    scaled_BHR = torch.addcmul(shift_R, rows_BHR, scale_R)
    return scaled_BHR.view(batch, height, width, channels).permute(0, 3, 1, 2)


@lru_cache(maxsize=16)
def _row_constants(
    width: int, device: torch.device, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Shift and scale [W·C] of a row of pixels.

    Channels are innermost: repeated over a row, the constants run at memory speed, which [.., C] does not.
    """
    with torch.inference_mode(False):  # they outlive the evaluation that may compute them first
        mean_R, std_R = (torch.tensor(v, device=device).repeat(width) for v in (mean, std))
        return -mean_R / std_R, 1 / (255 * std_R)


def _grid(
    settings: Augmentation, area: Tensor, x: Tensor, y: Tensor, flip: Tensor, turn: Tensor, *, size: int
) -> Tensor:
    """The position in the photo of each pixel of the view: float32 [B, H, W, 2] of (x, y), both in [-1, 1].

    The same map as `affine_grid`, but the sum of a row and a column term, which is eight times as fast.
    """
    low, high = settings.crop_scale
    side_B = (low + (high - low) * area).sqrt()
    angle_B = (2 * turn - 1) * math.radians(settings.rotation_degrees)
    sign_B = torch.where(flip < 0.5, -1.0, 1.0) if settings.flip else torch.ones_like(flip)
    cos_B1, sin_B1 = (side_B * angle_B.cos()).unsqueeze(1), (side_B * angle_B.sin()).unsqueeze(1)
    x_B1, y_B1 = (((1 - side_B) * (2 * draw - 1)).unsqueeze(1) for draw in (x, y))
    centers_S = (torch.arange(size) * 2 + 1) / size - 1
    columns_BS = centers_S * sign_B.unsqueeze(1)
    grid_BHW2 = torch.empty(len(area), size, size, 2)
    torch.add((cos_B1 * columns_BS).unsqueeze(1), (x_B1 - sin_B1 * centers_S).unsqueeze(2), out=grid_BHW2[..., 0])
    torch.add((sin_B1 * columns_BS).unsqueeze(1), (y_B1 + cos_B1 * centers_S).unsqueeze(2), out=grid_BHW2[..., 1])
    return grid_BHW2
