"""A store's camera, for partitions whose stores differ in look: cast, brightness, blur, resolution."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from fedshelf.core.errors import DataError
from fedshelf.data.decode import UnusablePhotoError, decode_upright

_JPEG_QUALITY = 90


@dataclass(frozen=True, kw_only=True, slots=True)
class Camera:
    """How a camera renders: `gains` per channel (colour cast and brightness), `gamma` (above 1 darkens the middle),
    `blur` (standard deviation as a share of the shorter side), `resolution` (share of pixels a side that it resolves).
    """

    gains: tuple[float, float, float]
    gamma: float
    blur: float
    resolution: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Camera":
        """A camera at random: plainly different from others, still good enough to tell products."""
        cast = rng.uniform(-0.25, 0.25)
        tint = rng.uniform(-0.1, 0.1)
        brightness = rng.uniform(0.75, 1.25)
        return cls(
            gains=(brightness * (1 + cast), brightness * (1 + tint), brightness * (1 - cast)),
            gamma=rng.uniform(0.7, 1.4),
            blur=rng.uniform(0.0, 0.012),
            resolution=rng.uniform(0.35, 1.0),
        )

    def render(self, photo: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The photo [H, W, 3] as this camera shows it, same shape."""
        height, width = photo.shape[:2]
        coarse = (max(1, round(width * self.resolution)), max(1, round(height * self.resolution)))
        seen = np.asarray(cv2.resize(photo, coarse, interpolation=cv2.INTER_AREA))
        seen = np.asarray(cv2.resize(seen, (width, height), interpolation=cv2.INTER_LINEAR))
        if self.blur * min(height, width) > 0.1:
            seen = np.asarray(cv2.GaussianBlur(seen, (0, 0), self.blur * min(height, width)))
        light: NDArray[np.float64] = (seen / 255.0) ** self.gamma * np.array(self.gains)
        rendered: NDArray[np.uint8] = np.clip(light * 255, 0, 255).astype(np.uint8)
        return rendered


def take_again(source: Path, target: Path, camera: Camera) -> None:
    """Write the photo at `source` as `camera` shows it, as JPEG.

    Raises:
        DataError: the photo cannot be decoded.
    """
    try:
        photo = decode_upright(source.read_bytes())
    except UnusablePhotoError as error:
        raise DataError(
            f"photo '{source}' cannot be altered: {error}. Remove it ('fedshelf data check' names all such photos)"
        ) from error
    target.write_bytes(simplejpeg.encode_jpeg(camera.render(photo), quality=_JPEG_QUALITY))
