"""A copy of a photo that holds its picture and nothing else: no location, no owner, no thumbnail."""

import io

import cv2
import numpy as np
from PIL import Image

from fedshelf.core.errors import DataError
from fedshelf.data.decode import UnusablePhotoError, decode_upright

MAX_SIDE = 1600
"""Longest side of a copy in pixels: far more than a network sees."""
QUALITY = 92


def clean_copy(data: bytes) -> bytes:
    """Encode a photo anew as a JPEG, upright, at most `MAX_SIDE` pixels wide and high.

    The same photo always gives the same bytes.

    Args:
        data: the photo file's bytes.

    Raises:
        DataError: it is not a photo, or larger than a photo is.
    """
    try:
        pixels = decode_upright(data)
    except UnusablePhotoError as error:
        raise DataError(f"the photo cannot be decoded: {error}") from error
    height, width = pixels.shape[:2]
    scale = MAX_SIDE / max(height, width)
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=QUALITY)  # an array has no metadata to write
    return out.getvalue()
