"""Features of each product at a store on a day, from the sales before that day (columns: `core.sales_columns`).

    units_1, units_7, units_28    log of the mean units a day over the last 1, 7 and 28 days, against the mean product
    level                         the same over the last 364 days
    price                         log of the newest price, against the mean of the last 364 days
    promotion, promotions_ahead   planned promotion on the day itself; share of the 7 days from then on
    promotions_28                 share of the last 28 days with a promotion
    weekday_…, season_…           sine and cosine of the day in the week and in the year
    days_since_sale               log of the days since the last sale, 0 (yesterday's) to 1 (60 and more)

The mean product is the mean over all products with sales before the day, over the last 28 days. A tenth of a unit a day
is added to each mean. Nothing that was sold or charged on the day itself or later has an influence; only promotions
are plans. A product that was never sold before the day has no sales data. A photo that was taken before the second day
of the table, or more than `MAX_AGE` days after its end, has no sales at all.

Shapes: N photos, U days, T days of the table, P products of the table, K classes, W figures for each product.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedshelf.core.sales_columns import BASE, FEATURES, HAS, HORIZON, KNOWN, MIX, TARGET, WIDTH
from fedshelf.data.sales import Sales

MAX_AGE = 21
"""Days after the end of a table on which it still describes the store."""
HELD_OUT = 56
"""Last days of a table that no forecast is trained on: they measure it."""
_SHORT, _LONG, _YEAR = 7, 28, 364  # days; 364 are 52 weeks, with the same weekdays
_EXTRA = 0.1  # units a day
_LONGEST_GAP = 60  # days since the last sale
_SEASON = 365.25

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SalesHistory:
    """A store's sales, ready to give features of any day.

    Attributes:
        sales: the sales.
    """

    sales: Sales

    def block(self, days_N: NDArray[np.int64], mix_K: NDArray[np.float32]) -> NDArray[np.float32]:
        """The figures of photos.

        Args:
            days_N: the day of each photo, as an ordinal; 0 if unknown.
            mix_K: log of each class's share among the store's training photos, times K.

        Returns:
            [N, K · W]; zeros for photos without sales.
        """
        days_U, which_N = np.unique(days_N, return_inverse=True)
        rows_UPW = self.rows(days_U)
        found = np.zeros((len(days_U), len(mix_K), WIDTH), np.float32)
        found[:, self.sales.labels] = rows_UPW
        found[rows_UPW[:, :, HAS].any(1), :, MIX] = mix_K
        return found.reshape(len(days_U), -1)[which_N]

    def rows(self, days_U: NDArray[np.int64]) -> NDArray[np.float64]:
        """The figures [U, P, W] of the table's products, all zero without sales data, without the mix of products."""
        at = days_U - self.sales.first_day
        is_covered = (at > 0) & (at <= self.sales.num_days + MAX_AGE)
        at = np.where(is_covered, at, 1)
        rows = np.zeros((len(at), len(self.sales.labels), WIDTH))
        end = np.minimum(at, self.sales.num_days)
        rows[:, :, HAS] = (self._sums[end] > 0) & is_covered[:, None]
        year = self._mean(at, _YEAR, 0.0)
        month = self._mean(at, _LONG, year)
        week = self._mean(at, _SHORT, month)
        means = {"units_1": self._mean(at, 1, week), "units_7": week, "units_28": month, "level": year}
        usual = _mean_product(month, rows[:, :, HAS])
        columns = {name: np.log((mean + _EXTRA) / (usual + _EXTRA)) for name, mean in means.items()}
        columns["price"] = self._price_ratio(at)
        columns["promotion"] = self._promoted(at, at + 1)
        columns["promotions_ahead"] = self._promoted(at, at + HORIZON)
        columns["promotions_28"] = self._promoted(at - _LONG, at)
        for name, period in (("weekday", 7.0), ("season", _SEASON)):
            angle = 2 * np.pi * days_U[:, None] / period
            columns[f"{name}_sin"], columns[f"{name}_cos"] = np.sin(angle), np.cos(angle)
        gap = np.minimum(at[:, None] - 1 - self._last_sale[end - 1], _LONGEST_GAP)
        columns["days_since_sale"] = np.log1p(gap) / np.log1p(_LONGEST_GAP)
        for column, name in enumerate(FEATURES):
            rows[:, :, column] = columns[name]
        rows[:, :, BASE] = np.log(HORIZON * (month + _EXTRA))
        is_known = at + HORIZON <= self.sales.num_days - HELD_OUT
        rows[:, :, KNOWN] = is_known[:, None]
        rows[:, :, TARGET] = np.where(is_known[:, None], self.units_after(at), 0)
        rows *= rows[:, :, HAS, None]
        return rows

    def held_out_weeks(self) -> NDArray[np.int64]:
        """The first days of the weeks that measure a forecast; none if the table is shorter than a year more."""
        last = self.sales.num_days
        starts = np.arange(last - HELD_OUT, last, HORIZON)
        return starts + self.sales.first_day if len(starts) and starts[0] > _YEAR else starts[:0]

    def simple_forecasts(self, days_U: NDArray[np.int64]) -> dict[str, Array]:
        """Forecasts [U, P] of the units of 7 days without a model, and the units themselves as `units`."""
        at = days_U - self.sales.first_day
        return {
            "units": self.units_after(at),
            "last_week": self._sold(at - HORIZON, at),
            "four_week_mean": self._sold(at - _LONG, at) * HORIZON / _LONG,
            "year_ago": self._sold(at - _YEAR, at - _YEAR + HORIZON),
        }

    def units_after(self, at: NDArray[np.int64]) -> Array:
        """Units sold on the 7 days from each day on [U, P], as far as the table goes."""
        return self._sold(at, at + HORIZON)

    @cached_property
    def _sums(self) -> Array:
        """Units sold before each day [T + 1, P]."""
        return np.concatenate([np.zeros((1, len(self.sales.labels))), self.sales.units.cumsum(0)])

    @cached_property
    def _last_sale(self) -> NDArray[np.int64]:
        """The last day with a sale up to each day [T, P]; far back if there is none."""
        days = np.arange(self.sales.num_days)[:, None]
        return np.maximum.accumulate(np.where(self.sales.units > 0, days, -_LONGEST_GAP), axis=0)

    @cached_property
    def _log_prices(self) -> tuple[Array, Array, Array]:
        """Log of the newest price up to each day [T, P] (NaN without one); sums and counts before each day."""
        prices = np.where(self.sales.prices > 0, self.sales.prices, np.nan)
        logs = np.log(prices)
        days = np.where(np.isnan(logs), -1, np.arange(len(logs))[:, None])
        newest = np.maximum.accumulate(days, axis=0)
        filled = np.where(newest >= 0, np.take_along_axis(logs, np.maximum(newest, 0), axis=0), np.nan)
        start = np.zeros((1, logs.shape[1]))
        sums, counts = np.nan_to_num(logs).cumsum(0), (~np.isnan(logs)).cumsum(0)
        return filled, np.concatenate([start, sums]), np.concatenate([start, counts])

    @cached_property
    def _promotion_sums(self) -> Array:
        promotions = self.sales.promotions
        return np.concatenate([np.zeros((1, promotions.shape[1])), promotions.cumsum(0)])

    def _sold(self, start: NDArray[np.int64], end: NDArray[np.int64]) -> Array:
        start, end = (np.clip(each, 0, self.sales.num_days) for each in (start, end))
        found: Array = self._sums[end] - self._sums[start]
        return found

    def _mean(self, at: NDArray[np.int64], days: int, otherwise: Array | float) -> Array:
        """Units a day [U, P] in the days before each; `otherwise` where the table has none of them."""
        start, end = (np.clip(each, 0, self.sales.num_days) for each in (at - days, at))
        count = (end - start)[:, None]
        return np.where(count > 0, (self._sums[end] - self._sums[start]) / np.maximum(count, 1), otherwise)

    def _price_ratio(self, at: NDArray[np.int64]) -> Array:
        newest, sums, counts = self._log_prices
        start, end = (np.clip(each, 0, self.sales.num_days) for each in (at - _YEAR, at))
        mean = (sums[end] - sums[start]) / np.maximum(counts[end] - counts[start], 1)
        return np.clip(np.nan_to_num(newest[end - 1] - mean), -2.0, 2.0)

    def _promoted(self, start: NDArray[np.int64], end: NDArray[np.int64]) -> Array:
        length = (end - start)[:, None]
        start, end = (np.clip(each, 0, len(self.sales.promotions)) for each in (start, end))
        return np.asarray((self._promotion_sums[end] - self._promotion_sums[start]) / length)


def mix_of(labels_M: NDArray[np.int64], num_classes: int) -> NDArray[np.float32]:
    """Log of each class's share among a store's photos, times the number of classes [K].

    Each class counts half a photo more than it has (`personalization.head`).

    Args:
        labels_M: classes of the photos.
        num_classes: K.
    """
    counts = np.bincount(labels_M, minlength=num_classes) + 0.5
    return np.asarray(np.log(counts / counts.sum() * num_classes), np.float32)


def _mean_product(mean_UP: Array, has_UP: Array) -> Array:
    """The mean [U, 1] over the products that have sales data."""
    found: Array = (mean_UP * has_UP).sum(1, keepdims=True) / np.maximum(has_UP.sum(1, keepdims=True), 1)
    return found
