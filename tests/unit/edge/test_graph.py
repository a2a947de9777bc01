"""The graph around the network: resize and normalization as in training."""

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from fedshelf.data.augmentation import normalize
from fedshelf.data.decode import squash
from fedshelf.edge.making.graph import Preparation, input_graph
from tests.unit.data.samples import pixels

PLAIN = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)  # gray levels as they are
# Height and width: equal, larger, smaller, one of each, by whole and odd factors, and extreme ones.
SIZES = [
    (48, 48), (49, 47), (47, 49), (96, 96), (97, 131), (480, 640), (24, 24), (5, 7), (20, 300), (300, 20), (48, 200),
    (200, 48), (1, 1), (1, 900), (900, 1), (2, 3000), (1500, 2000),
]  # fmt: skip


def run(preparation: Preparation, image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The normalized pixels [3, S, S]."""
    session = onnxruntime.InferenceSession(
        input_graph(preparation).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found: NDArray[np.float32] = session.run(None, {"image": image[None]})[0][0]
    return found


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_resize_of_the_graph_is_that_of_training_within_a_gray_level(height: int, width: int, noisy: bool) -> None:
    image = pixels(3, width, height)
    if noisy:
        image = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = run(Preparation(image_size=48, mean=PLAIN[0], std=PLAIN[1]), image).transpose(1, 2, 0)
    difference = np.abs(found - squash(image, 48).astype(np.float32))
    assert difference.max() <= 1 + 1e-3
    assert difference.mean() < 0.3, "it is rounding, not a shift"
    assert height != 48 or width != 48 or difference.max() < 1e-3


def test_the_normalization_of_the_graph_is_that_of_training() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image = pixels(1, 32, 32)
    expected = normalize(torch.from_numpy(image[None].copy()), torch.device("cpu"), mean, std)[0].numpy()
    assert np.abs(run(Preparation(image_size=32, mean=mean, std=std), image) - expected).max() < 1e-6
