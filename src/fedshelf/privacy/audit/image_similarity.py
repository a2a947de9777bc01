"""How alike two pictures are: PSNR, and SSIM (Wang et al. 2004, "Image Quality Assessment: From Error Visibility to
Structural Similarity").

SSIM compares luminance, contrast and structure within a Gaussian window that slides over the pictures: 1 for equal
ones, near 0 for unrelated ones.

Differs from the paper: each color channel is compared, and the mean over channels is reported. Pictures smaller than
the window of 11 pixels have a window of their own size.

Shapes: B pictures, H height, W width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_PSNR = 100.0  # dB, of equal pictures
_WINDOW, _DEVIATION = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def psnr(one_3HW: Tensor, other_3HW: Tensor) -> float:
    """The peak signal-to-noise ratio (dB) of two pictures with values from 0 to 1; at most `MAX_PSNR`."""
    error = float((one_3HW - other_3HW).square().mean())
    return MAX_PSNR if error <= 10 ** (-MAX_PSNR / 10) else -10 * math.log10(error)


def ssim(one_3HW: Tensor, other_3HW: Tensor) -> float:
    """The structural similarity of two pictures with values from 0 to 1; at most 1."""
    side = min(_WINDOW, *one_3HW.shape[1:])
    offsets = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
    profile = torch.exp(-offsets.square() / (2 * _DEVIATION**2))
    window = torch.outer(profile, profile) / profile.sum().square()

    def blurred(picture_3HW: Tensor) -> Tensor:
        return F.conv2d(picture_3HW.unsqueeze(1), window.view(1, 1, side, side))

    mean, other_mean = blurred(one_3HW), blurred(other_3HW)
    variance = blurred(one_3HW.square()) - mean.square()
    other_variance = blurred(other_3HW.square()) - other_mean.square()
    covariance = blurred(one_3HW * other_3HW) - mean * other_mean
    luminance = (2 * mean * other_mean + _C1) / (mean.square() + other_mean.square() + _C1)
    structure = (2 * covariance + _C2) / (variance + other_variance + _C2)
    return float((luminance * structure).mean())


def best_matches(originals_B3HW: Tensor, made_B3HW: Tensor) -> list[tuple[int, float]]:
    """Match each original with a picture of its own, the most alike first: the order of a batch cannot be known.

    Args:
        originals_B3HW: the originals, with values from 0 to 1.
        made_B3HW: as many pictures, or more.

    Returns:
        By original, the index of its picture and their SSIM.
    """
    pairs = sorted(
        ((ssim(one, other), i, j) for i, one in enumerate(originals_B3HW) for j, other in enumerate(made_B3HW)),
        reverse=True,
    )
    found: dict[int, tuple[int, float]] = {}
    for value, i, j in pairs:
        if i not in found and j not in {index for index, _ in found.values()}:
            found[i] = j, value
    return [found[i] for i in range(len(originals_B3HW))]
