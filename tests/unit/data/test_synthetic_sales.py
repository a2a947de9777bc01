"""Synthetic sales: the process that its module states, reproducibly, without touching a photo."""

import csv
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fedshelf.core.errors import DataError
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.folder import class_folders, scan
from fedshelf.data.photo_dates import photo_dates
from fedshelf.data.sales import read_sales
from fedshelf.data.synthetic_sales import FIRST_DAY, TEST_DAYS, TRAIN_DAYS, draw_stores, write_synthetic_sales
from tests.unit.data.samples import write_pack

NAMES = [f"product-{number:02}" for number in range(40)]


def test_rates_follow_store_product_season_weekday_and_promotion() -> None:
    drawn = draw_stores({f"store-{number}": NAMES for number in range(20)}, seed=1, listed=1.0)
    rates = np.stack([store.rates for store in drawn.values()])  # [S, T, K]
    logs = np.log(rates)
    assert np.median(rates.mean((1, 2))) == pytest.approx(8 * np.exp((0.8**2 + 0.6**2) / 2 + 0.3), rel=0.35)
    weekdays = logs.reshape(20, 104, 7, 40).mean((0, 1, 3))
    assert weekdays - weekdays[3] == pytest.approx([-0.15, -0.2, -0.1, 0.0, 0.15, 0.35, -0.05], abs=0.03)
    promoted = np.stack([store.promotions for store in drawn.values()])
    assert promoted.mean() == pytest.approx(0.08, abs=0.01)
    assert logs[promoted].mean() - logs[~promoted].mean() == pytest.approx(2 * -np.log(0.75), abs=0.15)
    prices = np.stack([store.prices for store in drawn.values()])
    assert (prices[promoted] < prices.mean()).mean() > 0.5
    assert logs.mean((0, 1)).std() == pytest.approx(0.8, abs=0.25)


def test_units_vary_more_than_poisson_as_a_negative_binomial_of_five() -> None:
    (store,) = draw_stores({"a": NAMES}, seed=2, listed=1.0).values()
    excess = ((store.units - store.rates) ** 2 - store.rates) / store.rates**2
    assert excess.mean() == pytest.approx(1 / 5, abs=0.02)


def test_products_are_listed_for_the_given_share_of_the_time_in_runs_of_twelve_weeks() -> None:
    drawn = draw_stores({f"store-{number}": NAMES for number in range(10)}, seed=3, listed=0.6)
    on = np.concatenate([store.rates[::7] > 0 for store in drawn.values()], axis=1)  # [W, S · K]
    assert on.mean() == pytest.approx(0.6, abs=0.03)
    ends = (on[:-1] & ~on[1:]).sum() / on[:-1].sum()
    assert 1 / ends == pytest.approx(12, rel=0.15)
    assert all((store.units[store.rates == 0] == 0).all() for store in drawn.values())


def test_days_of_photos_follow_the_rates_with_gamma_one_and_nothing_with_zero() -> None:
    (store,) = draw_stores({"a": NAMES}, seed=4, listed=0.6).values()
    window, rng = (371, 609), np.random.default_rng(0)
    name = NAMES[int(store.rates[slice(*window)].std(0).argmax())]
    rates = store.rates[slice(*window), NAMES.index(name)]
    for gamma, expected in ((1.0, (rates**2).sum() / rates.sum()), (0.0, rates.mean())):
        days = store.days_of(name, 4000, window, gamma, rng)
        assert {window[0] <= (day - FIRST_DAY).days < window[1] for day in days} == {True}
        assert np.mean([store.rates[(day - FIRST_DAY).days, NAMES.index(name)] for day in days]) == pytest.approx(
            expected, rel=0.1
        )


def stores(root: Path) -> dict[str, Path]:
    counts = {"Fruit/Apple": 6, "Tea": 5}
    return {name: write_pack(root / name, counts) for name in ("north", "south")}


def digests(root: Path) -> Counter[str]:
    return Counter(hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*.png"))


def test_files_are_written_next_to_photos_that_stay_as_they_are(tmp_path: Path) -> None:
    folders, test = stores(tmp_path), write_pack(tmp_path / "test", {"Fruit/Apple": 4, "Soap": 2})
    before = digests(tmp_path)
    counts = write_synthetic_sales(folders, seed=5, gamma=1.0, listed=1.0, test=test)
    assert digests(tmp_path) == before
    assert counts == {"north": 728 * 2, "south": 728 * 2}
    found = scan(folders["north"], val_fraction=0.0, seed=0)
    sales = read_sales(folders["north"] / "sales.csv", Catalogue.resolve({"north": class_folders(found.train)}))
    assert sales is not None
    assert (sales.num_days, len(sales.labels), sales.num_ignored) == (728, 2, 0)
    days = photo_dates(folders["north"], found.train) - FIRST_DAY.toordinal()
    assert ((days >= TRAIN_DAYS[0]) & (days < TRAIN_DAYS[1])).all()
    with (test / "photos.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["store"] for row in rows} == {"north", "south"}
    assert len(rows) == 8  # no store sells soap
    tested = photo_dates(test, scan(test, val_fraction=0.0, seed=0).train, store="south") - FIRST_DAY.toordinal()
    assert ((tested >= TEST_DAYS[0]) & (tested < TEST_DAYS[1])).sum() == 4


def test_the_same_seed_gives_the_same_files_and_another_one_others(tmp_path: Path) -> None:
    texts = []
    for number, seed in enumerate((6, 6, 7)):
        folders = stores(tmp_path / str(number))
        write_synthetic_sales(folders, seed=seed, gamma=1.0, listed=0.6)
        texts.append([(folders["south"] / name).read_text(encoding="utf-8") for name in ("sales.csv", "photos.csv")])
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[2][0]
    assert texts[0][1] != texts[2][1]


def test_existing_sales_are_never_replaced(tmp_path: Path) -> None:
    folders = stores(tmp_path)
    (folders["south"] / "sales.csv").write_text("real", encoding="utf-8")
    with pytest.raises(DataError, match=r"are not replaced: '.*south/sales.csv'"):
        write_synthetic_sales(folders, seed=5, gamma=1.0, listed=1.0)
    assert not (folders["north"] / "sales.csv").exists()
    assert (folders["south"] / "sales.csv").read_text(encoding="utf-8") == "real"
