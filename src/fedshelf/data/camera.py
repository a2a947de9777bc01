"""A store's camera, for partitions whose stores differ in appearance: color cast, brightness, blur, resolution."""

from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from fedshelf.data.decode import decode_upright

_JPEG_QUALITY = 90


@dataclass(frozen=True, kw_only=True, slots=True)
class Camera:
    """How a camera renders a scene.

    Attributes:
        gains: factor per channel (color cast and brightness).
        gamma: above 1 darkens midtones.
        blur: standard deviation, as a share of the shorter side.
        resolution: share of the pixels per side that it resolves.
    """

    gains: tuple[float, float, float]
    gamma: float
    blur: float
    resolution: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Camera":
        """A random camera: clearly different from others, but good enough to distinguish products."""
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
        """Render the photo [H, W, 3] with this camera, same shape."""
        height, width = photo.shape[:2]
        coarse = (max(1, round(width * self.resolution)), max(1, round(height * self.resolution)))
        seen = np.asarray(cv2.resize(photo, coarse, interpolation=cv2.INTER_AREA))
        seen = np.asarray(cv2.resize(seen, (width, height), interpolation=cv2.INTER_LINEAR))
        if self.blur * min(height, width) > 0.1:
            seen = np.asarray(cv2.GaussianBlur(seen, (0, 0), self.blur * min(height, width)))
        light: NDArray[np.float64] = (seen / 255.0) ** self.gamma * np.array(self.gains)
        rendered: NDArray[np.uint8] = np.clip(light * 255, 0, 255).astype(np.uint8)
        return rendered

    def rerender(self, data: bytes) -> bytes:
        """Render a photo file with this camera.

        Args:
            data: bytes of the file.

        Returns:
            Bytes of a JPEG file.

        Raises:
            UnusablePhotoError: the photo cannot be decoded.
        """
        return bytes(simplejpeg.encode_jpeg(self.render(decode_upright(data)), quality=_JPEG_QUALITY))
