"""Tables of sales: what is read, what is refused with which lines, and what is ignored."""

import sys
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from fedshelf.core.errors import DataError
from fedshelf.data import sales
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.sales import read_sales

CATALOGUE = Catalogue(("Apple", "Milk", "Tea"), (("Fruit/Apple", "Pomme"), ("Dairy/Milk",), ("Tea",)))
FIRST = date(2026, 1, 5).toordinal()


def write(folder: Path, *rows: str, header: str = "date,product,units,price,promotion") -> Path:
    path = folder / "sales.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def problems(path: Path) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        read_sales(path, CATALOGUE)
    return tuple(str(problem) for problem in caught.value.args)


def test_rows_become_units_prices_and_promotions_by_day_and_product(tmp_path: Path) -> None:
    found = read_sales(write(
        tmp_path, "2026-01-05,Apple,3,1.50,0", "2026-01-07,Apple,4,1.20,1", "2026-01-06,Tea,2.5,,",
    ), CATALOGUE)  # fmt: skip
    assert found is not None
    assert found.first_day == FIRST
    assert found.labels.tolist() == [0, 2]
    assert found.units.tolist() == [[3, 0], [0, 2.5], [4, 0]]
    assert np.array_equal(found.prices, [[1.5, np.nan], [np.nan, np.nan], [1.2, np.nan]], equal_nan=True)
    assert found.promotions.tolist() == [[False, False], [False, False], [True, False]]


def test_columns_may_stand_in_any_order_and_promotion_may_be_missing(tmp_path: Path) -> None:
    path = write(tmp_path, "2,Apple,1.50,2026-01-05", header="\ufeffUnits, product ,price,Date")
    found = read_sales(path, CATALOGUE)
    assert found is not None
    assert found.units.tolist() == [[2]]
    assert not found.promotions.any()


def test_names_are_paths_folder_names_and_aliases_of_one_product_whose_rows_add_up(tmp_path: Path) -> None:
    found = read_sales(write(
        tmp_path, "2026-01-05,Apple,3,1,", "2026-01-05,Fruit/Apple,4,3,", "2026-01-05,Pomme,5,2,1",
    ), CATALOGUE)  # fmt: skip
    assert found is not None
    assert found.labels.tolist() == [0]
    assert (found.units.item(), found.prices.item(), found.promotions.item()) == (12, 2, True)


def test_a_day_with_more_returns_than_sales_counts_as_a_day_without_sales(tmp_path: Path) -> None:
    found = read_sales(write(
        tmp_path, "2026-01-05,Apple,3,1,", "2026-01-05,Apple,-1,1,", "2026-01-06,Apple,-2,1,",
    ), CATALOGUE)  # fmt: skip
    assert found is not None
    assert found.units.tolist() == [[2], [0]]


def test_names_are_the_same_whichever_way_accents_are_written(tmp_path: Path) -> None:
    coffee = Catalogue(("Caf\u00e9",), (("Caf\u00e9",),))
    found = read_sales(write(tmp_path, "2026-01-05,Cafe\u0301,3,1,", "2026-01-05,Caf\u00e9,4,1,"), coffee)
    assert found is not None
    assert found.units.tolist() == [[7]]


def test_rows_without_units_are_plans_for_days_to_come(tmp_path: Path) -> None:
    found = read_sales(write(tmp_path, "2026-01-05,Apple,3,1,", "2026-01-07,Apple,,1,1"), CATALOGUE)
    assert found is not None
    assert found.num_days == 1
    assert found.promotions.tolist() == [[False], [False], [True]]


def test_rows_of_unknown_products_are_counted_and_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(
        tmp_path, "2026-01-05,Apple,3,1,", "2026-01-05,Soap,9,1,", "2026-01-06,Soap,9,1,", "2026-01-06,Gin,1,1,"
    )
    found = read_sales(path, CATALOGUE)
    assert found is not None
    assert found.num_ignored == 3
    assert found.num_days == 1
    assert "3 rows of 2 products that the catalogue does not have" in caplog.text


def test_a_table_of_unknown_products_alone_is_no_sales(tmp_path: Path) -> None:
    assert read_sales(write(tmp_path, "2026-01-05,Soap,9,1,"), CATALOGUE) is None


def test_all_kinds_of_problems_are_listed_at_once_with_their_lines_and_no_values(tmp_path: Path) -> None:
    found = problems(write(
        tmp_path, "05.01.2026,Apple,3,1,", "2026-02-30,Apple,3,1,", "2026-01-05,,3,1,", "", "2026-01-05,Apple,many,1,",
        "2026-01-05,Apple,inf,1,", "2026-01-05,Apple,3,-1,", "2026-01-05,Apple,3,1,perhaps", "2026-01-05,Apple,nan,1,",
        "2026-01-05,Apple,1e9,1,",
    ))  # fmt: skip
    assert [problem.partition("', ")[2].partition(":")[0] for problem in found] == [
        "lines 2, 3", "line 4", "lines 6, 7, 10, 11", "line 8", "line 9",
    ]  # fmt: skip
    for value in ("05.01", "many", "perhaps", "Apple"):
        assert value not in " ".join(found)


def test_many_wrong_lines_are_counted(tmp_path: Path) -> None:
    (problem,) = problems(write(tmp_path, *["x,Apple,1,1,"] * 12))
    assert "lines 2, 3, 4, 5, 6 and 7 more: the date" in problem


def test_decimal_commas_are_explained(tmp_path: Path) -> None:
    (problem,) = problems(write(tmp_path, "2026-01-05,Apple,3,1.5,0", "2026-01-06,Apple,3,1,50,0"))
    assert "line 3: more values than the first line has columns. Write numbers with a decimal point" in problem


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty: its first line names the columns"),
        (b"date;product;units;price\n2026-01-05;Apple;3;1\n", "lacks 4 columns (date, product, units, price)"),
        (b"date,product,units\n2026-01-05,Apple,3\n", "lacks 1 column (price)"),
        (b"date,product,units,price\n2026-01-05,Caf\xe9,3,1\n", "it is not UTF-8 text; save it as UTF-8"),
    ],
)
def test_a_table_of_another_form_is_refused_with_what_it_needs(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "sales.csv"
    path.write_bytes(content)
    assert expected in problems(path)[0]


def test_dates_that_span_more_than_ten_years_are_refused(tmp_path: Path) -> None:
    (problem,) = problems(write(tmp_path, "2010-01-05,Apple,3,1,", "2026-01-05,Apple,3,1,"))
    assert "the dates span more than 3,660 days" in problem


def test_a_table_that_is_too_large_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "2026-01-05,Apple,3,1,")
    monkeypatch.setattr(sales, "MAX_BYTES", 10)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("it was read"))
    assert "10 is the most" in problems(path)[0]


def test_more_figures_than_fit_into_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sales, "MAX_CELLS", 5)
    (problem,) = problems(write(tmp_path, "2026-01-05,Apple,3,1,", "2026-01-07,Tea,3,1,"))
    assert "2 products on 3 days are more than 5 figures" in problem


def test_without_polars_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polars", None)
    assert problems(write(tmp_path, "2026-01-05,Apple,3,1,"))[0].endswith("pip install 'fedshelf[sales]'")
