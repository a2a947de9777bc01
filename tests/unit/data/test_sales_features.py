"""Features of sales: what they are, and that they know nothing of the day itself or later."""

from dataclasses import replace
from datetime import date

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedshelf.core.sales_columns import BASE, FEATURES, HAS, KNOWN, MIX, TARGET, WIDTH
from fedshelf.data.sales import Sales
from fedshelf.data.sales_features import HELD_OUT, MAX_AGE, SalesHistory, mix_of

FIRST = date(2024, 1, 1).toordinal()
DAYS, PRODUCTS = 500, 3


def sales(seed: int = 0, days: int = DAYS) -> Sales:
    rng = np.random.default_rng(seed)
    promotions = rng.random((days + 14, PRODUCTS)) < 0.1
    return Sales(
        first_day=FIRST, labels=np.array([0, 2, 5]), units=rng.poisson(4.0, (days, PRODUCTS)).astype(float),
        prices=np.where(promotions[:days], 1.5, 2.0), promotions=promotions,
    )  # fmt: skip


def features(of: Sales, day: int) -> dict[str, NDArray[np.float64]]:
    (rows,) = SalesHistory(of).rows(np.array([FIRST + day]))
    return {name: rows[:, column] for column, name in enumerate(FEATURES)} | {
        "base": rows[:, BASE],
        "has": rows[:, HAS],
    }


@settings(max_examples=60, deadline=None)
@given(day=st.integers(1, DAYS + MAX_AGE), seed=st.integers(0, 5), later=st.integers(0, 40))
def test_no_change_of_sales_on_the_day_or_later_changes_a_feature(day: int, seed: int, later: int) -> None:
    given_sales, rng = sales(seed), np.random.default_rng(seed)
    units, prices = given_sales.units.copy(), given_sales.prices.copy()
    units[day:] = rng.poisson(90.0, units[day:].shape)
    prices[day:] = rng.uniform(1, 99, prices[day:].shape)
    end = max(day, DAYS - later)  # the table may also end earlier
    changed = replace(given_sales, units=units[:end], prices=prices[:end])
    if day > end + MAX_AGE:
        return
    before, after = features(given_sales, day), features(changed, day)
    for name in before:
        if day <= end:
            assert np.array_equal(before[name], after[name]), name


def test_each_of_the_last_days_changes_a_feature() -> None:
    given_sales, day = sales(), 450
    for back in (1, 7, 28, 364):
        units = given_sales.units.copy()
        units[day - back] += 50
        before, after = features(given_sales, day), features(replace(given_sales, units=units), day)
        assert any(not np.array_equal(before[name], after[name]) for name in before), back


def test_means_are_logs_against_the_mean_product() -> None:
    units = np.zeros((60, PRODUCTS))
    units[:, 0] = 4.0
    units[-7:, 0] = 8.0
    units[:, 1] = 2.0
    found = features(replace(sales(), units=units, prices=np.full((60, PRODUCTS), np.nan)), 60)
    month = (8 * 7 + 4 * 21) / 28
    usual = (month + 2.0) / 2  # of the two products that have sales
    assert found["units_7"][0] == pytest.approx(np.log(8.1 / (usual + 0.1)))
    assert found["units_28"][0] == pytest.approx(np.log((month + 0.1) / (usual + 0.1)))
    assert found["level"][1] == pytest.approx(np.log(2.1 / (usual + 0.1)))
    assert found["base"][1] == pytest.approx(np.log(7 * 2.1))
    assert found["has"].tolist() == [1, 1, 0]
    assert not any(found[name][2] for name in FEATURES)


def test_prices_are_compared_with_the_year_and_promotions_are_known_ahead() -> None:
    prices = np.full((100, PRODUCTS), np.nan)
    prices[10, 0], prices[20, 0] = 2.0, 1.0
    promotions = np.zeros((110, PRODUCTS), np.bool_)
    promotions[100:102, 0] = True
    promotions[90, 0] = True
    found = features(replace(sales(days=100), prices=prices, promotions=promotions), 100)
    assert found["price"][0] == pytest.approx(np.log(1.0) - (np.log(2.0) + np.log(1.0)) / 2)
    assert found["price"][1] == 0
    assert (found["promotion"][0], found["promotions_ahead"][0]) == (1, pytest.approx(2 / 7))
    assert found["promotions_28"][0] == pytest.approx(1 / 28)


def test_days_since_the_last_sale_go_from_zero_to_one() -> None:
    units = np.ones((200, PRODUCTS))
    units[150:, 1] = 0
    units[50:, 2] = 0
    found = features(replace(sales(), units=units), 160)["days_since_sale"]
    assert found[0] == 0
    assert found[1] == pytest.approx(np.log1p(10) / np.log1p(60))
    assert found[2] == 1


def test_weekday_and_season_come_round() -> None:
    at, week_later, day_later = (features(sales(), day) for day in (400, 407, 401))
    assert at["weekday_sin"] == pytest.approx(week_later["weekday_sin"])
    assert at["weekday_sin"] != pytest.approx(day_later["weekday_sin"])
    assert at["season_cos"] == pytest.approx(features(sales(), 400 - 365)["season_cos"], abs=0.02)


def test_photos_outside_of_the_table_or_without_a_date_have_no_sales() -> None:
    history, mix = SalesHistory(sales()), mix_of(np.array([0, 0, 2]), 6)
    days = np.array([0, FIRST, FIRST + 1, FIRST + DAYS + MAX_AGE, FIRST + DAYS + MAX_AGE + 1, FIRST - 9])
    block = history.block(days, mix).reshape(6, 6, WIDTH)
    assert [bool(rows.any()) for rows in block] == [False, False, True, True, False, False]
    assert np.array_equal(block[2, :, MIX], mix)
    assert not block[2, [1, 3, 4], :MIX].any()  # products that the table does not have


def test_the_target_is_what_is_sold_on_the_day_and_the_six_after_it_but_not_in_the_held_out_weeks() -> None:
    given_sales = sales()
    (rows,) = SalesHistory(given_sales).rows(np.array([FIRST + 300]))
    assert rows[:, TARGET].tolist() == given_sales.units[300:307].sum(0).tolist()
    assert rows[:, KNOWN].all()
    last = DAYS - HELD_OUT - 7
    known = SalesHistory(given_sales).rows(np.array([FIRST + last, FIRST + last + 1]))[:, :, KNOWN]
    assert known.tolist() == [[1, 1, 1], [0, 0, 0]]


def test_forecasts_without_a_model_are_those_of_the_week_the_month_and_the_year_before() -> None:
    history, units = SalesHistory(sales()), sales().units
    days = history.held_out_weeks()
    assert (days - FIRST).tolist() == list(range(DAYS - 56, DAYS, 7))
    found, at = history.simple_forecasts(days), DAYS - 56
    assert found["units"][0].tolist() == units[at : at + 7].sum(0).tolist()
    assert found["last_week"][0].tolist() == units[at - 7 : at].sum(0).tolist()
    assert found["four_week_mean"][0] == pytest.approx(units[at - 28 : at].sum(0) / 4)
    assert found["year_ago"][0].tolist() == units[at - 364 : at - 357].sum(0).tolist()
    assert not len(SalesHistory(sales(days=400)).held_out_weeks())


def test_the_mix_of_products_counts_half_a_photo_more_of_each() -> None:
    assert np.exp(mix_of(np.array([1, 1, 2]), 4)) / 4 == pytest.approx(np.array([0.5, 2.5, 1.5, 0.5]) / 5)
