from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fedshelf.core.errors import DataError
from fedshelf.data.cache import PhotoCache
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.dataset import load_photos, warn_of_left_out
from fedshelf.data.decode import decode
from fedshelf.data.folder import scan
from fedshelf.data.photo_set import PhotoSet
from tests.unit.data.samples import write_pack


@pytest.fixture
def cache(tmp_path: Path) -> PhotoCache:
    return PhotoCache(root=tmp_path / "cache")


def test_each_photo_has_the_index_of_its_class_and_other_classes_are_left_out_and_named(
    tmp_path: Path, cache: PhotoCache, caplog: pytest.LogCaptureFixture
) -> None:
    photos = scan(write_pack(tmp_path / "s", {"Milk": 2, "X/Bread": 3, "Fish": 2}), val_fraction=0, seed=0).train
    catalogue = Catalogue(("Bread", "Cheese", "Milk"), (("Bread",), ("Cheese",), ("Milk",)))
    loaded = load_photos(photos, catalogue, cache, 16)
    assert loaded.left_out == {"Fish": 2}
    assert not caplog.text
    assert loaded.photo_set.labels.tolist() == [2, 2, 0, 0, 0]
    assert loaded.photo_set.labels.dtype == np.int64
    for image, photo in zip(loaded.photo_set.images, [p for p in photos if p.class_path != "Fish"], strict=True):
        np.testing.assert_array_equal(image, decode(photo.path.read_bytes(), 16))


def test_the_first_few_classes_that_are_left_out_are_named_with_their_store_and_cannot_break_the_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    left_out = Counter({"fish": 2, "new\nline": 1} | {f"x{number}": 1 for number in range(100)})
    warn_of_left_out(left_out, Catalogue(("Fish",), (("Fish",),)), whose="lyon")
    (line,) = caplog.messages
    assert line.startswith(
        "lyon: left out: 103 photos of classes that are not in the catalogue: fish (2; the catalogue"
    )
    assert r", new\x0aline (1), " in line
    assert line.endswith(" and 97 more")


def test_labels_stay_with_their_photos_when_one_is_unusable(tmp_path: Path, cache: PhotoCache) -> None:
    root = write_pack(tmp_path / "s", {"A": 2, "B": 1})
    (root / "A" / "000.png").write_text("no photo")
    photos = scan(root, val_fraction=0, seed=0).train
    loaded = load_photos(photos, Catalogue(("A", "B"), (("A",), ("B",))), cache, 16)
    assert loaded.photo_set.labels.tolist() == [0, 1]
    assert [problem.path.name for problem in loaded.problems] == ["000.png"]


def test_photos_of_unknown_classes_only_give_an_empty_set(tmp_path: Path, cache: PhotoCache) -> None:
    photos = scan(write_pack(tmp_path / "s", {"A": 2}), val_fraction=0, seed=0).train
    loaded = load_photos(photos, Catalogue(("B",), (("B",),)), cache, 16)
    assert len(loaded.photo_set) == 0
    assert loaded.left_out == {"A": 2}


def test_unusable_photos_only_are_an_error_unless_allowed(tmp_path: Path, cache: PhotoCache) -> None:
    (tmp_path / "s" / "A").mkdir(parents=True)
    (tmp_path / "s" / "A" / "1.jpg").write_text("no photo")
    photos = scan(tmp_path / "s", val_fraction=0, seed=0).train
    catalogue = Catalogue(("A",), (("A",),))
    with pytest.raises(DataError, match="none of its photos can be used"):
        load_photos(photos, catalogue, cache, 16)
    assert len(load_photos(photos, catalogue, cache, 16, allow_empty=True).photo_set) == 0


def test_images_and_labels_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="2 images but 1 labels"):
        PhotoSet(np.zeros((2, 4, 4, 3), np.uint8), np.zeros(1, np.int64))
