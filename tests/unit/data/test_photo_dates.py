"""The day of a photo: from a table, the camera, or the file's name, in this order."""

from datetime import date
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from fedshelf.core.errors import DataError
from fedshelf.data.folder import scan
from fedshelf.data.layout import doubts
from fedshelf.data.photo_dates import UNKNOWN, photo_dates, warn_of_undated
from fedshelf.data.photo_files import Photo, list_photos
from tests.unit.data.samples import pixels, write_photo


def photo(root: Path, name: str, taken: str = "") -> Photo:
    path = root / "Tea" / name
    path.parent.mkdir(exist_ok=True)
    exif = Image.Exif()
    if taken:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = taken
    Image.fromarray(pixels(0)).save(path, exif=exif)
    return Photo(class_path="Tea", path=path)


def day(text: str) -> int:
    return date.fromisoformat(text).toordinal()


def table(root: Path, *rows: str, header: str = "photo,date") -> None:
    (root / "photos.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")


def problems(root: Path) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        photo_dates(root, [])
    return tuple(str(problem) for problem in caught.value.args)


def test_the_table_counts_before_the_camera_and_the_camera_before_the_name(tmp_path: Path) -> None:
    photos = [
        photo(tmp_path, "IMG_20260103_101500.jpg", taken="2026:01:02 10:15:00"),
        photo(tmp_path, "IMG_20260103_101501.jpg", taken="2026:01:02 10:15:00"),
        photo(tmp_path, "IMG_20260103_101502.jpg"),
        photo(tmp_path, "shelf.jpg"),
    ]
    table(tmp_path, "Tea/IMG_20260103_101500.jpg,2026-01-01")
    expected = [day("2026-01-01"), day("2026-01-02"), day("2026-01-03"), UNKNOWN]
    assert photo_dates(tmp_path, photos).tolist() == expected


def test_an_empty_date_in_the_table_says_that_the_day_is_unknown(tmp_path: Path) -> None:
    found = photo_dates(tmp_path, [photo(tmp_path, "20260103.jpg")])
    table(tmp_path, "Tea/20260103.jpg,")
    assert found.tolist() == [day("2026-01-03")]
    assert photo_dates(tmp_path, [Photo(class_path="Tea", path=tmp_path / "Tea/20260103.jpg")]).tolist() == [UNKNOWN]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("IMG_20260517_101112.jpg", "2026-05-17"), ("20260517101112.jpg", "2026-05-17"),
        ("IMG-20260517-WA0001.jpg", "2026-05-17"), ("2026-05-17 tea.jpg", "2026-05-17"),
        ("2026.05.17.jpg", "2026-05-17"), ("x_2026_05_17.png", "2026-05-17"), ("20260230_20260301.jpg", "2026-03-01"),
        ("20261317.jpg", ""), ("120260517.jpg", ""), ("2026-0517.jpg", ""), ("2026051712.jpg", ""), ("0517.jpg", ""),
    ],
)  # fmt: skip
def test_dates_in_names(tmp_path: Path, name: str, expected: str) -> None:
    found = photo_dates(tmp_path, [photo(tmp_path, name)])
    assert found.tolist() == [day(expected) if expected else UNKNOWN]


@pytest.mark.parametrize("taken", ["0000:00:00 00:00:00", "1980:01:01 00:00:00", "yesterday", "2026:13:01 00:00:00"])
def test_clocks_that_were_never_set_say_nothing(tmp_path: Path, taken: str) -> None:
    assert photo_dates(tmp_path, [photo(tmp_path, "shelf.jpg", taken=taken)]).tolist() == [UNKNOWN]


def test_damaged_photos_have_the_date_of_their_name(tmp_path: Path) -> None:
    given = photo(tmp_path, "20260103.jpg", taken="2026:01:02 10:15:00")
    given.path.write_bytes(given.path.read_bytes()[:60])
    assert photo_dates(tmp_path, [given]).tolist() == [day("2026-01-03")]


def test_rows_of_a_store_count_for_it_and_rows_without_one_for_all(tmp_path: Path) -> None:
    photos = [photo(tmp_path, name) for name in ("a.jpg", "b.jpg")]
    table(tmp_path, "Tea/a.jpg,2026-01-01,north", "Tea/a.jpg,2026-01-02,south", "Tea/b.jpg,2026-01-03,",
          header="photo,date,store")  # fmt: skip
    assert photo_dates(tmp_path, photos, store="north").tolist() == [day("2026-01-01"), day("2026-01-03")]
    assert photo_dates(tmp_path, photos, store="south").tolist() == [day("2026-01-02"), day("2026-01-03")]
    assert photo_dates(tmp_path, photos).tolist() == [UNKNOWN, day("2026-01-03")]


def test_all_problems_of_the_table_are_listed_with_their_lines(tmp_path: Path) -> None:
    table(tmp_path, "Tea/a.jpg,1.1.2026", ",2026-01-01", "Tea/b.jpg,2026-01-01", "", "Tea/b.jpg,2026-01-02",
          "Tea/c.jpg,2026-1-1")  # fmt: skip
    assert [problem.partition("', ")[2] for problem in problems(tmp_path)] == [
        "lines 2, 7: the date is not of the form 2026-11-30",
        "line 3: the photo is missing",
        "line 6: the photo already has another date",
    ]


def test_a_table_without_the_columns_is_refused(tmp_path: Path) -> None:
    table(tmp_path, "Tea/a.jpg;2026-01-01", header="photo;date")
    assert "its first line must name the columns photo,date" in problems(tmp_path)[0]


def test_the_tables_next_to_photos_are_no_findings_of_a_scan(tmp_path: Path) -> None:
    names = [write_photo(tmp_path / "Tea" / f"{number}.png", number).name for number in range(12)]
    table(tmp_path, *(f"Tea/{name},2026-01-01" for name in names))
    (tmp_path / "sales.csv").write_text("date,product,units,price\n", encoding="utf-8")
    assert scan(tmp_path, val_fraction=0.1, seed=0).findings == ()
    assert doubts(list_photos(tmp_path)) == []


def test_photos_without_a_date_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_undated(np.array([UNKNOWN, 5, UNKNOWN]), whose="north")
    assert "north: no date is known for 2 of 3 photos" in caplog.text
