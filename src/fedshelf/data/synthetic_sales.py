"""Synthetic sales, for trials: no real store's figures are public together with its photos.

Units of product k at store s on day t are Poisson(Gamma(5, rate/5)), a negative binomial, with

    ln rate = a_s + b_k + d_sk + rho_k cos(2 pi (t - phi_k) / 364) + w_weekday + e_k ln(p / p_0) + u_sk,week

    a ~ N(ln 8, .3)   store                  rho ~ U(.2, 1.2), phi ~ U(0, 364)   season of the product
    b ~ N(0, .8)      product                w = -.15 -.2 -.1 0 .15 .35 -.05     Monday to Sunday
    d ~ N(0, .6)      product at the store   e ~ U(-3, -1)                       elasticity of price
    u                 weekly AR(1) of coefficient .7 and standard deviation .2

A product is on promotion, at p = .75 p_0, in a week of a store with probability .08. It is listed for a geometric
number of weeks of mean 12, and then not for so many that it is listed for a share q of the time; unlisted, its rate is
0. A photo of a product is given a day with probability proportional to rate^gamma: with gamma 1 sales say what a photo
may show, with 0 they say nothing.

Shapes: T days, W weeks, K products.
"""

import csv
import hashlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedshelf.core.errors import DataError
from fedshelf.core.text import from_filesystem, some
from fedshelf.data.folder import scan
from fedshelf.data.photo_files import PHOTO_DATES, SALES, Photo
from fedshelf.storage.atomic_files import write_atomically

NUM_WEEKS = 104
FIRST_DAY = date(2024, 1, 1)  # a Monday
TRAIN_DAYS = (371, 609)  # of photos to train on; a year of sales lies before them
TEST_DAYS = (616, 721)  # of test photos; a week of sales lies after them
_WEEKDAYS = np.array([-0.15, -0.2, -0.1, 0.0, 0.15, 0.35, -0.05])
_PROMOTION, _DISCOUNT, _LISTED_WEEKS = 0.08, 0.75, 12.0


@dataclass(frozen=True, kw_only=True, eq=False)
class SyntheticStore:
    """The synthetic sales of one store.

    Attributes:
        products: names of the products [K].
        rates: expected units [T, K]; 0 where a product is not listed.
        units: units sold [T, K].
        prices: prices [T, K].
        promotions: promotions [T, K].
    """

    products: tuple[str, ...]
    rates: NDArray[np.float64]
    units: NDArray[np.int64]
    prices: NDArray[np.float64]
    promotions: NDArray[np.bool_]

    def days_of(
        self, product: str, count: int, window: tuple[int, int], gamma: float, rng: np.random.Generator
    ) -> list[date]:  # fmt: skip
        """Draw the days of `count` photos of a product within a window of days, proportional to rate^gamma."""
        rates = self.rates[slice(*window), self.products.index(product)]
        weights = np.power(rates, gamma) if gamma and rates.any() else np.ones(len(rates))
        days = rng.choice(len(weights), size=count, p=weights / weights.sum()) + window[0]
        return [FIRST_DAY + timedelta(days=int(day)) for day in days]

    def table(self) -> str:
        """The sales as CSV. A product has a row on each day on which it is listed."""
        rows = (
            (FIRST_DAY + timedelta(days=day), product, self.units[day, k], f"{self.prices[day, k]:.2f}",
             int(self.promotions[day, k]))
            for day in range(len(self.rates))
            for k, product in enumerate(self.products)
            if self.rates[day, k] > 0
        )  # fmt: skip
        return _csv(("date", "product", "units", "price", "promotion"), rows)


def draw_stores(products: Mapping[str, Sequence[str]], *, seed: int, listed: float) -> dict[str, SyntheticStore]:
    """Draw the sales of stores.

    Args:
        products: by store, the products that it sells.
        seed: seed of everything.
        listed: share of the time for which a product is listed, in (0, 1].
    """
    names = sorted({name for held in products.values() for name in held})
    rng = np.random.default_rng([seed, 0])
    count = len(names)
    chain = {
        "b": rng.normal(0, 0.8, count), "rho": rng.uniform(0.2, 1.2, count), "phi": rng.uniform(0, 364, count),
        "e": rng.uniform(-3, -1, count), "p0": rng.uniform(1, 6, count),
    }  # fmt: skip
    found = {}
    for store, held in sorted(products.items()):
        mine = np.searchsorted(names, sorted(held))
        found[store] = _draw_store(
            tuple(sorted(held)), {name: values[mine] for name, values in chain.items()}, _generator(seed, store), listed
        )
    return found


def write_synthetic_sales(
    stores: Mapping[str, Path], *, seed: int, gamma: float, listed: float, test: Path | None = None
) -> dict[str, int]:  # fmt: skip
    """Write synthetic sales, and synthetic dates of photos, into the folders of stores. Photos are not changed.

    Args:
        stores: the folder of each store.
        seed: seed of everything.
        gamma: how strongly photos follow sales.
        listed: share of the time for which a product is listed.
        test: folder of test photos, which are given a date at each store that sells their product.

    Returns:
        Rows of sales by store.

    Raises:
        DataError: a folder cannot be used, or has sales or dates already, which are not replaced.
    """
    folders = [*stores.values(), *([test] if test else [])]
    taken = [str(folder / name) for folder in folders for name in (SALES, PHOTO_DATES) if (folder / name).exists()]
    if taken:
        raise DataError(f"sales or dates are there already, and are not replaced: {some(taken)}. Remove them first")
    photos = {name: scan(folder, val_fraction=0.0, seed=0).train for name, folder in stores.items()}
    held = {name: sorted({photo.class_path for photo in found}) for name, found in photos.items()}
    tested = scan(test, val_fraction=0.0, seed=0).train if test else ()
    drawn, counts, test_rows = draw_stores(held, seed=seed, listed=listed), {}, []
    for name, folder in stores.items():
        store, rng = drawn[name], _generator(seed, f"{name}/photos")
        days = _dated(photos[name], store, TRAIN_DAYS, gamma, rng)
        write_atomically(folder / SALES, store.table())
        write_atomically(
            folder / PHOTO_DATES, _csv(("photo", "date"), ((_name(photo, folder), day) for photo, day in days))
        )
        counts[name] = int((store.rates > 0).sum())
        if test is not None:
            days = _dated(tested, store, TEST_DAYS, gamma, rng, only_listed=gamma > 0)
            test_rows += [(_name(photo, test), day, name) for photo, day in days]
    if test is not None:
        write_atomically(test / PHOTO_DATES, _csv(("photo", "date", "store"), test_rows))
    return counts


def _draw_store(
    products: tuple[str, ...], chain: Mapping[str, NDArray[np.float64]], rng: np.random.Generator, listed: float
) -> SyntheticStore:  # fmt: skip
    count, days = len(products), np.arange(7 * NUM_WEEKS)
    level = rng.normal(math.log(8), 0.3) + chain["b"] + rng.normal(0, 0.6, count)
    season = chain["rho"] * np.cos(2 * np.pi * (days[:, None] - chain["phi"]) / 364)
    promoted = rng.random((NUM_WEEKS, count)) < _PROMOTION
    weekly = chain["e"] * math.log(_DISCOUNT) * promoted + _autoregressive(count, rng)
    on = _listings(count, listed, rng)
    logs = level + season + _WEEKDAYS[days % 7][:, None] + np.repeat(weekly, 7, axis=0)
    rates = np.exp(logs) * np.repeat(on, 7, axis=0)
    promotions = np.repeat(promoted, 7, axis=0)
    return SyntheticStore(
        products=products, rates=rates, units=rng.poisson(rng.gamma(5.0, rates / 5.0)), promotions=promotions,
        prices=chain["p0"] * np.where(promotions, _DISCOUNT, 1.0),
    )  # fmt: skip


def _autoregressive(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """u [W, K]."""
    steps = rng.normal(0, 0.2, (NUM_WEEKS, count))
    for week in range(1, NUM_WEEKS):
        steps[week] = 0.7 * steps[week - 1] + math.sqrt(1 - 0.7**2) * steps[week]
    return steps


def _listings(count: int, listed: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Whether each product is listed in each week [W, K]."""
    on = np.ones((NUM_WEEKS, count), np.bool_)
    if listed >= 1:
        return on
    ends, begins = 1 / _LISTED_WEEKS, min(1.0, listed / (1 - listed) / _LISTED_WEEKS)
    on[0] = rng.random(count) < listed
    for week in range(1, NUM_WEEKS):
        changes = rng.random(count) < np.where(on[week - 1], ends, begins)
        on[week] = on[week - 1] ^ changes
    return on


def _dated(
    photos: Sequence[Photo], store: SyntheticStore, window: tuple[int, int], gamma: float, rng: np.random.Generator, *,
    only_listed: bool = False,
) -> list[tuple[Photo, date]]:  # fmt: skip
    """The photos of the store's products, with the days that they are given.

    With `only_listed`, there are no photos of products that are listed on none of the days.
    """
    found: list[tuple[Photo, date]] = []
    for product in store.products:
        mine = [photo for photo in photos if photo.class_path == product]
        if only_listed and not store.rates[slice(*window), store.products.index(product)].any():
            continue
        found += zip(mine, store.days_of(product, len(mine), window, gamma, rng), strict=True)
    return found


def _name(photo: Photo, folder: Path) -> str:
    return from_filesystem(photo.path.relative_to(folder).as_posix())


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, 1, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")])


def _csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
