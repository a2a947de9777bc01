"""`fedshelf data make-demo`: a small synthetic photo set.

Five stores with few photos each: each store sells only some of the products (each product is sold by several stores),
has photos of only some of a product's colors, and its own light and shelves. The test photos show all products in all
colors under every store's light, so only the stores together can learn all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg

from fedshelf.core.errors import UsageError
from fedshelf.data.demo_products import PRODUCTS, Product
from fedshelf.data.demo_scene import LOOKS, Look, draw_photo
from fedshelf.data.filesystem import whole_folder

_JPEG_QUALITY = 88
_COLORS_PER_STORE = 3
_EVENNESS = 1.5  # of a product's photos over the stores that sell it (Dirichlet)
_README = """Synthetic photos, drawn by 'fedshelf data make-demo' (seed {seed}).
Products, stores and light are invented.

stores/STORE/CLASS/*.jpg   what each store has
test/CLASS/*.jpg           all products, seen in all stores, for the final figure
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSet:
    """The demo set on disk.

    Attributes:
        stores: folder of the stores.
        test: folder of the test photos.
        num_train: photos in all stores.
        num_test: test photos.
        classes: by store, the classes that it sells.
    """

    stores: Path
    test: Path
    num_train: int
    num_test: int
    classes: dict[str, tuple[str, ...]]


def make_demo(
    out: Path,
    *,
    seed: int = 0,
    photos_per_class: int = 90,
    test_photos_per_class: int = 25,
    image_size: int = 96,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DemoSet:
    """Draw the set into `out/stores/<store>/CLASS/*.jpg` and `out/test/CLASS/*.jpg`.

    Args:
        out: created; must be missing or empty.
        seed: the same seed draws the same photos.
        photos_per_class: over all stores.
        test_photos_per_class: test photos.
        image_size: side of the square photos in pixels.
        progress: called with the number of photos drawn and the total.

    Raises:
        DataError: `out` is not empty or cannot be written.
        UsageError: fewer photos than stores that sell a class, or photos too small to show anything.
    """
    if photos_per_class < len(LOOKS) or test_photos_per_class < 1:
        raise UsageError(f"a demo set needs at least one test photo and {len(LOOKS)} others per class")
    if image_size < 32:
        raise UsageError(f"a demo photo of {image_size} pixels shows nothing: give at least 32")
    plan = _plan(seed, photos_per_class, test_photos_per_class)
    with whole_folder(out) as work:
        for done, shot in enumerate(plan, start=1):
            rng = np.random.default_rng([seed, done])
            photo = draw_photo(shot.product, shot.color, shot.look, image_size, rng)
            path = work / shot.folder / shot.product.name / f"{shot.product.name}_{shot.number:03}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(simplejpeg.encode_jpeg(photo, quality=_JPEG_QUALITY))
            progress(done, len(plan))
        (work / "README.txt").write_text(_README.format(seed=seed), encoding="utf-8")
    return _drawn(plan, out)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shot:
    """One photo to draw."""

    folder: str
    product: Product
    color: int
    look: Look
    number: int


def _drawn(plan: Sequence[_Shot], out: Path) -> DemoSet:
    """The content of `out` once all of `plan` is drawn."""
    sold = {(shot.folder.removeprefix("stores/"), shot.product.name) for shot in plan if shot.folder != "test"}
    return DemoSet(
        stores=out / "stores",
        test=out / "test",
        num_train=sum(shot.folder != "test" for shot in plan),
        num_test=sum(shot.folder == "test" for shot in plan),
        classes={
            store: tuple(sorted(name for seller, name in sold if seller == store))
            for store in sorted({seller for seller, _ in sold})
        },
    )


def _plan(seed: int, photos_per_class: int, test_photos_per_class: int) -> list[_Shot]:
    """Assign the photos: which product, in which color, in which store."""
    rng = np.random.default_rng([seed, 0])
    plan: list[_Shot] = []
    start = int(rng.integers(len(LOOKS)))
    for position, product in enumerate(PRODUCTS):
        # Each class is missing from one store in turn; the others have uneven shares of its photos.
        missing = (start + position) % len(LOOKS)
        sellers = [store for store in range(len(LOOKS)) if store != missing]
        shares = rng.dirichlet(np.full(len(sellers), _EVENNESS))
        for number in range(photos_per_class):
            seller = sellers[int(np.searchsorted(np.cumsum(shares)[:-1], rng.random()))]
            color = product.colors[(seller + int(rng.integers(_COLORS_PER_STORE))) % len(product.colors)]
            folder = f"stores/store-{seller + 1}"
            plan.append(_Shot(folder=folder, product=product, color=color, look=LOOKS[seller], number=number))
        for number in range(test_photos_per_class):
            color = product.colors[number % len(product.colors)]
            look = LOOKS[int(rng.integers(len(LOOKS)))]
            plan.append(_Shot(folder="test", product=product, color=color, look=look, number=number))
    return plan
