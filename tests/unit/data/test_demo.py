import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fedshelf.core.errors import DataError, UsageError
from fedshelf.data.demo import make_demo
from fedshelf.data.demo_products import COLORS, PRODUCTS, draw_package
from fedshelf.data.folder import scan


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_same_seed_draws_the_same_photos_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_demo(tmp_path / name, seed=seed, photos_per_class=5, test_photos_per_class=1, image_size=32)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a").values() != contents(tmp_path / "c").values()


def test_five_stores_with_part_of_the_products_each_and_all_products_in_the_test_photos(tmp_path: Path) -> None:
    made = make_demo(tmp_path / "demo", photos_per_class=20, test_photos_per_class=4, image_size=32)
    stores = {path.name: scan(path, val_fraction=0, seed=0) for path in made.stores.iterdir()}
    assert sorted(stores) == [f"store-{number}" for number in range(1, 6)]
    sold = {name: tuple(entry.leaf for entry in folder.classes) for name, folder in stores.items()}
    assert sold == made.classes
    products = {product.name for product in PRODUCTS}
    assert set(itertools.chain(*sold.values())) == products
    assert all(set(classes) < products for classes in sold.values())
    assert sum(len(folder.train) for folder in stores.values()) == made.num_train == 20 * len(products)
    test = scan(made.test, val_fraction=0, seed=0)
    assert Counter(photo.class_path for photo in test.train) == dict.fromkeys(products, 4)
    with Image.open(test.train[0].path) as photo:
        assert photo.size == (32, 32)


def test_no_single_cue_names_a_product() -> None:
    assert max(Counter(color for product in PRODUCTS for color in product.colors).values()) > 1
    assert set(itertools.chain(*(product.colors for product in PRODUCTS))) == set(range(len(COLORS)))
    assert min(Counter(product.shape for product in PRODUCTS).values()) >= 2
    assert min(Counter(product.pattern for product in PRODUCTS).values()) >= 2
    assert len({(product.shape, product.pattern) for product in PRODUCTS}) == len(PRODUCTS)


def test_packages_of_different_products_differ_even_in_the_same_colours() -> None:
    drawn = {
        product.name: draw_package(product, 0, np.random.default_rng(0)).astype(int)
        for product in PRODUCTS
    }  # fmt: skip
    for one, other in itertools.combinations(drawn.values(), 2):
        assert np.abs(one - other).mean() > 5


def test_progress_ends_with_all_photos(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    make_demo(
        tmp_path / "demo", photos_per_class=5, test_photos_per_class=1, image_size=32,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen[-1] == (72, 72)
    assert len(seen) == 72


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(DataError, match="exists already"):
        make_demo(tmp_path, photos_per_class=5, test_photos_per_class=1, image_size=32)


@pytest.mark.parametrize("wrong", [{"photos_per_class": 4}, {"test_photos_per_class": 0}, {"image_size": 8}])
def test_senseless_numbers_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        make_demo(tmp_path / "demo", **wrong)  # type: ignore[arg-type]


def test_neighbours_in_pixels_do_not_tell_the_products_apart(tmp_path: Path) -> None:
    made = make_demo(tmp_path / "demo", photos_per_class=25, test_photos_per_class=8, image_size=48)

    def load(*roots: Path) -> tuple[NDArray[np.float32], list[str]]:
        photos = [photo for root in roots for photo in scan(root, val_fraction=0, seed=0).train]
        images = np.stack([np.asarray(Image.open(photo.path), np.float32).ravel() for photo in photos])
        return images, [photo.class_path for photo in photos]

    train, train_labels = load(*sorted(made.stores.iterdir()))
    test, test_labels = load(made.test)
    nearest = ((train**2).sum(1)[None] - 2 * test @ train.T).argmin(1)
    accuracy = np.mean([train_labels[i] == label for i, label in zip(nearest, test_labels, strict=True)])
    assert 1 / len(PRODUCTS) < accuracy < 0.5
