"""Photos and labels of Datasets."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from fedshelf.api.datasets import indexed, read_datasets, to_pixels
from fedshelf.core.errors import DataError
from tests.unit.data.samples import pixels

PIXELS = pixels(1, 40, 30)


def test_all_kinds_of_one_photo_give_the_same_pixels() -> None:
    floats = torch.from_numpy(PIXELS.copy()).permute(2, 0, 1) / 255
    kinds = [Image.fromarray(PIXELS), PIXELS, torch.from_numpy(PIXELS.copy()), floats, floats.numpy(), floats.double()]
    found = [to_pixels(kind, 16) for kind in kinds]
    assert found[0].shape == (16, 16, 3)
    assert all(np.array_equal(found[0], other) for other in found)


def test_gray_photos_become_rgb_and_a_pillow_image_is_turned_upright() -> None:
    gray = PIXELS[:, :, 0]
    kinds = [Image.fromarray(gray), gray, gray[:, :, None], torch.from_numpy(gray.copy())[None] / 255]
    found = [to_pixels(kind, 16) for kind in kinds]
    assert all(np.array_equal(found[0], other) for other in found)
    turned = Image.fromarray(PIXELS)
    turned.getexif()[0x0112] = 3
    assert np.array_equal(to_pixels(turned, 16), to_pixels(PIXELS, 16)[::-1, ::-1])


@pytest.mark.parametrize(
    ("photo", "said"),
    [
        ("apple.jpg", "a photo is a str: give a Pillow image"),
        (np.zeros((3, 4, 4), np.uint8), "a photo is uint8 of shape 3x4x4: give uint8 as"),
        (np.zeros((4, 4, 3), np.int64), "a photo is int64 of shape 4x4x3"),
        (np.zeros((4, 4, 3), np.float32), "a photo is float32 of shape 4x4x3: give floats as"),
        (torch.full((3, 4, 4), 2.5), "values from 2.5 to 2.5: give floats from 0 to 1, without Normalize"),
        (torch.full((3, 4, 4), torch.nan), "values from nan to nan"),
        (np.zeros((0, 4, 3), np.uint8), "cannot be resized"),
        (torch.zeros(3, 0, 4), "a photo has values none"),
    ],
)
def test_what_is_no_photo_is_told(photo: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        to_pixels(photo, 16)


class Pairs(Dataset[Any]):
    def __init__(self, labels: list[Any], classes: list[str] | None = None) -> None:
        self.labels = labels
        if classes is not None:
            self.classes = classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        return PIXELS, self.labels[index]


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from ((PIXELS, label) for label in (2, 0))


def names(**datasets: Any) -> list[list[str]]:
    return [list(found.names) for found in read_datasets(datasets, 8)]


def test_classes_are_named_by_the_dataset_or_the_one_that_it_is_a_part_of() -> None:
    whole = Pairs([0, 1, 1], ["milk", "apple"])
    assert names(a=whole, b=Subset(whole, [2])) == [["milk", "apple", "apple"], ["apple"]]
    sets, classes = indexed(read_datasets({"a": whole, "b": Subset(Subset(whole, [0, 1]), [0])}, 8))
    assert classes == ("apple", "milk")
    assert [found.labels.tolist() for found in sets] == [[1, 0, 0], [1]]


def test_numbers_have_equal_length_in_all_stores_so_that_their_order_is_that_of_the_outputs() -> None:
    tensors = TensorDataset(torch.zeros(2, 3, 8, 8), torch.tensor([11, 3]))
    assert names(a=Pairs([np.int64(2)]), b=tensors, c=Streamed()) == [["02"], ["11", "03"], ["02", "00"]]


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (Pairs([]), "the Dataset of a is empty"),
        (Pairs([0, "milk"]), "the Dataset of a, item 1: the label is 'milk': give the index of a class"),
        (Pairs([-1]), "the label is -1"),
        (Pairs([True]), "the label is True"),
        (Pairs([0.5]), "the label is 0.5"),
        (Pairs([2], ["x", "y"]), "the label is 2, and the Dataset's attribute 'classes' has 2 names"),
        ([PIXELS], "it is a ndarray, not a pair"),
    ],
)  # fmt: skip
def test_what_is_no_labeled_photo_is_told_with_its_place(dataset: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_datasets({"a": dataset}, 8)


def test_names_in_some_datasets_only_are_an_error() -> None:
    with pytest.raises(DataError, match="the Datasets of 'b' have no attribute 'classes', but others do"):
        read_datasets({"a": Pairs([0], ["x"]), "b": Pairs([0])}, 8)
