"""A store's sales: a CSV table next to its photos, with the columns date, product, units, price and promotion.

    date        YYYY-MM-DD
    product     a product's folder name or path, or an alias of it
    units       units sold on that day, less those returned; empty on days to come
    price       the day's price, in any currency; may be empty
    promotion   1 or true where the product was, or will be, on promotion as planned; the column may be missing

Rows of the same day and product are added up: several tills, or several articles of one product. A day on which more
is returned than sold counts as a day without sales. A product without a row on a day sold nothing. Rows of products
that are not in the catalogue are counted and ignored. Error messages tell lines and columns, never values: a server
may be told why a store cannot take part.

Shapes: T days, P products of the table.
"""

import csv
import io
import logging
import math
import unicodedata
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedshelf.core.errors import DataError
from fedshelf.core.text import at_lines, counted
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.filesystem import reading
from fedshelf.data.folder import class_folder

if TYPE_CHECKING:
    import polars

MAX_BYTES = 256_000_000
MAX_ROWS = 5_000_000
MAX_DAYS = 3_660  # ten years
MAX_CELLS = 20_000_000  # days times products: 160 MB of figures
MAX_UNITS, MAX_PRICE = 1e6, 1e7  # on a day
_COLUMNS = ("date", "product", "units", "price")
_FLAGS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sales:
    """A store's sales by day.

    Attributes:
        first_day: the first day, as a proleptic Gregorian ordinal (`datetime.date.toordinal`).
        labels: index in the catalogue of each product [P], ascending.
        units: units sold [T, P], float64, not negative. The last of the T days is the last one with units.
        prices: mean price of a day [T, P], float64; NaN where there is none.
        promotions: planned promotions [T + days to come, P].
        num_ignored: rows of products that are not in the catalogue.
    """

    first_day: int
    labels: NDArray[np.int64]
    units: NDArray[np.float64]
    prices: NDArray[np.float64]
    promotions: NDArray[np.bool_]
    num_ignored: int = 0

    @property
    def num_days(self) -> int:
        """T."""
        return len(self.units)


def read_sales(path: Path, catalogue: Catalogue) -> Sales | None:
    """Read a store's sales.

    Args:
        path: the table.
        catalogue: gives products their index.

    Returns:
        The sales; None if no row with units is of a product in the catalogue.

    Raises:
        DataError: the table cannot be read, is too large, or has invalid rows (all kinds are listed, with lines);
            or polars is not installed.
    """
    try:
        import polars
    except ImportError:
        raise DataError(f"'{path.name}' needs polars, which is not installed: pip install 'fedshelf[sales]'") from None
    text = _text(path)
    try:
        table = polars.read_csv(text, infer_schema=False)
    except polars.exceptions.NoDataError:
        raise DataError(f"'{path}' is empty: {_header()}") from None
    except polars.exceptions.PolarsError:
        raise DataError(f"'{path}' is not a CSV table: {_why_not(text)}") from None
    table = table.rename({name: name.strip().lower() for name in table.columns})
    missing = [name for name in _COLUMNS if name not in table.columns]
    if missing:
        raise DataError(f"'{path}' lacks {counted(len(missing), 'column')} ({', '.join(missing)}): {_header()}")
    rows = _parsed(table)
    if problems := _problems(rows):
        raise DataError(*(f"'{path}', {problem}" for problem in problems))
    return _labelled(rows, catalogue, path)


def _text(path: Path) -> bytes:
    with reading(f"'{path}'"):
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(f"'{path}' has {size:,} bytes, {MAX_BYTES:,} is the most: keep the newest years")
        text = path.read_bytes()
        text.decode("utf-8-sig")
    return text


def _header() -> str:
    return "its first line names the columns, separated by commas: date,product,units,price,promotion"


def _why_not(text: bytes) -> str:
    """Name the lines that have more fields than the header."""
    reader = csv.reader(io.StringIO(text.decode("utf-8-sig"), newline=""))
    try:
        width = len(next(reader, []))
        lines = [reader.line_num for row in reader if len(row) > width]
    except csv.Error as error:
        return f"{error}"
    what = (
        f"{at_lines(lines)}: more values than the first line has columns" if lines else "quotation marks do not match"
    )
    return f"{what}. Write numbers with a decimal point, and put names that contain a comma into quotation marks"


def _parsed(table: "polars.DataFrame") -> "polars.DataFrame":
    """The columns as dates and numbers, null where a text is neither; those of the texts as `given_…`."""
    import polars as pl

    table = table.with_row_index("line", offset=2)
    columns = ["promotion"] if "promotion" in table.columns else []
    table = table.select("line", *(pl.col(name).str.strip_chars() for name in (*_COLUMNS, *columns)))
    table = table.filter(~pl.all_horizontal(pl.exclude("line").is_null()))  # empty lines
    if not columns:
        table = table.with_columns(promotion=pl.lit(None, pl.String))
    table = table.with_columns(pl.when(pl.col(pl.String) != "").then(pl.col(pl.String)).name.keep())
    return table.select(
        "line",
        pl.col("date").alias("given_date"),
        pl.when(pl.col("date").str.contains(r"^\d{4}-\d{2}-\d{2}$"))
        .then(pl.col("date").str.to_date("%Y-%m-%d", strict=False))
        .alias("date"),
        "product",
        *(pl.col(name).alias(f"given_{name}") for name in ("units", "price", "promotion")),
        *(pl.col(name).cast(pl.Float64, strict=False) for name in ("units", "price")),
        pl.col("promotion").str.to_lowercase().replace_strict(_FLAGS, default=None, return_dtype=pl.Boolean),
    )


def _problems(rows: "polars.DataFrame") -> list[str]:
    """What is wrong with the table: every kind of problem, with the lines that have it."""
    import polars as pl

    units, price = pl.col("units"), pl.col("price")
    kinds = {
        "the date is not of the form 2026-11-30": pl.col("date").is_null(),
        "the product is missing": pl.col("product").is_null(),
        f"units are not a number from -{MAX_UNITS:,.0f} to {MAX_UNITS:,.0f} with a decimal point": pl.col(
            "given_units"
        ).is_not_null()
        & ~(units.is_not_null() & units.is_finite() & (units.abs() <= MAX_UNITS)),
        f"the price is not a number from 0 to {MAX_PRICE:,.0f} with a decimal point": pl.col(
            "given_price"
        ).is_not_null()
        & ~(price.is_not_null() & price.is_finite() & (price >= 0) & (price <= MAX_PRICE)),
        "the promotion is none of 1, 0, true, false, yes and no": pl.col("given_promotion").is_not_null()
        & pl.col("promotion").is_null(),
    }
    found = [
        f"{at_lines(lines)}: {what}"
        for what, is_wrong in kinds.items()
        if (lines := rows.filter(is_wrong.fill_null(True))["line"].to_list())
    ]
    if rows.height > MAX_ROWS:
        found.append(f"{counted(rows.height, 'row')}: {MAX_ROWS:,} is the most. Keep the newest years")
    days = rows["date"].drop_nulls()
    if len(days) and (days.max() - days.min()).days >= MAX_DAYS:
        found.append(f"the dates span more than {MAX_DAYS:,} days. Keep the newest years, and correct wrong dates")
    return found


def _labelled(rows: "polars.DataFrame", catalogue: Catalogue, path: Path) -> Sales | None:
    """The rows of products in the catalogue as arrays."""
    import polars as pl

    names = rows["product"].unique().sort().to_list()
    index_of = {name: catalogue.index_of(class_folder(unicodedata.normalize("NFC", name))) for name in names}
    known = {name: index for name, index in index_of.items() if index is not None}
    ours = rows.filter(pl.col("product").is_in(list(known)))
    num_ignored, unknown = rows.height - ours.height, len(index_of) - len(known)
    if num_ignored:
        logger.warning(
            "'%s': ignored: %s of %s that the catalogue does not have",
            path, counted(num_ignored, "row"), counted(unknown, "product"),
        )  # fmt: skip
    sold = ours.filter(pl.col("units").is_not_null())
    if not sold.height:
        return None
    ours = ours.with_columns(label=pl.col("product").replace_strict(known, return_dtype=pl.Int64))
    days = ours.group_by("date", "label").agg(
        pl.col("units").sum(), pl.col("price").mean(), pl.col("promotion").fill_null(False).any()
    )
    first, last, end = (_ordinal(day) for day in (days["date"].min(), sold["date"].max(), days["date"].max()))
    labels = np.array(sorted({known[name] for name in ours["product"].unique()}), dtype=np.int64)
    if (end - first + 1) * len(labels) > MAX_CELLS:
        raise DataError(
            f"'{path}': {counted(len(labels), 'product')} on {counted(end - first + 1, 'day')} are more than "
            f"{MAX_CELLS:,} figures. Keep the newest years"
        )
    shape = (end - first + 1, len(labels))
    units, prices, promotions = np.zeros(shape), np.full(shape, math.nan), np.zeros(shape, np.bool_)
    at = (
        days["date"].to_physical().to_numpy() + date(1970, 1, 1).toordinal() - first,
        np.searchsorted(labels, days["label"].to_numpy()),
    )
    units[at] = np.maximum(days["units"].to_numpy(), 0)
    prices[at] = days["price"].cast(pl.Float64).to_numpy()
    promotions[at] = days["promotion"].to_numpy()
    kept = last - first + 1
    return Sales(
        first_day=first, labels=labels, units=units[:kept], prices=prices[:kept], promotions=promotions,
        num_ignored=num_ignored,
    )  # fmt: skip


def _ordinal(day: object) -> int:
    if not isinstance(day, date):
        raise TypeError(f"{day!r} is not a date")
    return day.toordinal()
