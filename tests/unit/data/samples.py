"""Small photos for tests: written to disk by Pillow, so that what reads them is tested against another encoder."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

GROCERIES_SMALL = Path(__file__).parents[4] / "shared" / "data" / "groceries-small.tar"

needs_groceries_small = pytest.mark.skipif(
    not GROCERIES_SMALL.exists(), reason=f"the real photos are not at {GROCERIES_SMALL}"
)


def pixels(seed: int, width: int = 40, height: int = 40) -> NDArray[np.uint8]:
    """A smooth random picture [height, width, 3]: what lossy formats keep well."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


def write_photo(path: Path, seed: int = 0, width: int = 40, height: int = 40) -> Path:
    """A photo in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, width, height)).save(path)
    return path


def write_pack(root: Path, counts: dict[str, int]) -> Path:
    """A folder with the given number of different photos per class path."""
    seed = 0
    for class_path, count in counts.items():
        for number in range(count):
            seed += 1
            write_photo(root / class_path / f"{number:03}.png", seed)
    return root
