"""The photos that a model file is checked on: a folder's, or drawn ones.

Shapes: S the side in pixels of the network's input; H, W those of a photo.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedshelf.core.errors import DataError
from fedshelf.core.text import counted
from fedshelf.data.cache import UnreadableFileError, read_photo
from fedshelf.data.decode import UnusablePhotoError, decode, decode_upright
from fedshelf.data.demo_products import PRODUCTS
from fedshelf.data.demo_scene import LOOKS, draw_photo
from fedshelf.data.photo_files import photos_below

MOST_CHECKED = 500
DRAWN = "generated photos"
# Heights and widths of drawn photos: of phones, upright and across, and narrow or tiny ones that stress the resize.
_SIZES = (
    (640, 480), (480, 640), (512, 512), (300, 900), (900, 300), (97, 131), (33, 64), (1, 200), (200, 1), (16, 16),
    (224, 224), (128, 128), (1000, 37), (75, 100), (250, 251), (2, 3),
)  # fmt: skip
_DRAWN_SIDE = 320


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckPhotos:
    """Photos to check a model file on.

    Attributes:
        source: where they come from, for the model card.
        readers: one for each photo, which returns the bytes of its file.
    """

    source: str
    readers: tuple[Callable[[], bytes], ...]

    def decoded(self, image_size: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        """Decode each photo twice. Photos that cannot be decoded are left out.

        Args:
            image_size: S.

        Yields:
            The photo as training sees it, uint8 [S, S, 3], and as another decoder gives it, at full size and upright,
            uint8 [H, W, 3].

        Raises:
            DataError: none of them can be decoded.
        """
        num_decoded, reason = 0, ""
        for read in self.readers:
            try:
                data = read()
                pair = decode(data, image_size), decode_upright(data)
            except (UnreadableFileError, UnusablePhotoError) as error:
                reason = str(error)
                continue
            num_decoded += 1
            yield pair
        if not num_decoded:
            raise DataError(f"not one of {self.source} can be used: {reason}")


def from_folder(folder: Path) -> CheckPhotos:
    """The photos below a folder, at any depth; at most `MOST_CHECKED` of them, evenly spread over the sorted names.

    Raises:
        DataError: the folder cannot be read, or holds no photo.
    """
    found = photos_below(folder)
    if not found:
        raise DataError(f"--check-photos '{folder}': no file below it has the name of a photo")
    count = min(len(found), MOST_CHECKED)
    chosen = [found[at * len(found) // count] for at in range(count)]
    of = f"{count:,} of " * (count < len(found))
    return CheckPhotos(
        source=f"{of}{counted(len(found), 'photo')} in '{folder.name}'", readers=tuple(_reader(path) for path in chosen)
    )


def drawn() -> CheckPhotos:
    """Synthetic photos of packages, JPEG files of different sizes. They are the same on every call."""
    rng = np.random.default_rng(0)
    files = []
    for number, (height, width) in enumerate(_SIZES):
        product = PRODUCTS[number % len(PRODUCTS)]
        drawing = draw_photo(product, product.colors[0], LOOKS[number % len(LOOKS)], _DRAWN_SIDE, rng)
        resized = cv2.resize(drawing, (width, height), interpolation=cv2.INTER_AREA)
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(resized, dtype=np.uint8)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return CheckPhotos(source=f"{len(files)} {DRAWN}", readers=tuple(_constant(data) for data in files))


def _reader(path: Path) -> Callable[[], bytes]:
    return lambda: read_photo(path)


def _constant(data: bytes) -> Callable[[], bytes]:
    return lambda: data
