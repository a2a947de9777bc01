"""The day on which each photo was taken. The first of these that gives one counts:

    1. the table `photos.csv` in the folder of the photos, with the columns photo and date (YYYY-MM-DD; empty: unknown)
    2. the camera: EXIF DateTimeOriginal
    3. a date in the file's name, such as IMG_20261130_101500.jpg or 2026-11-30.jpg

The table comes first because a person wrote it: clocks of cameras are often wrong. It may have a column store, where
several stores use the same photos, such as test photos; a row without a store is for all of them.

Days are proleptic Gregorian ordinals (`datetime.date.toordinal`).

Shapes: N photos.
"""

import csv
import io
import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedshelf.core.errors import DataError
from fedshelf.core.text import at_lines, counted, from_filesystem
from fedshelf.data.cache import UnreadableFileError, read_photo
from fedshelf.data.decode import time_taken
from fedshelf.data.filesystem import reading
from fedshelf.data.photo_files import PHOTO_DATES, Photo

UNKNOWN = 0
"""The day of a photo without a date."""
MAX_BYTES = 64_000_000
_FIRST_YEAR, _LAST_YEAR = 1990, 2100  # others are clocks that were never set
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
_IN_NAME = re.compile(r"(?<!\d)((?:19|20)\d\d)([-_.]?)(0[1-9]|1[0-2])\2(0[1-9]|[12]\d|3[01])(?!\d(?!\d{5}(?!\d)))")

logger = logging.getLogger(__name__)


def photo_dates(root: Path, photos: Sequence[Photo], *, store: str = "") -> NDArray[np.int64]:
    """Find the day of each photo.

    Args:
        root: the folder of the photos, with `photos.csv` if there is one.
        photos: photos below it.
        store: the store that uses them.

    Returns:
        The days [N]; `UNKNOWN` where there is none.

    Raises:
        DataError: `photos.csv` cannot be read or has invalid rows (all are listed).
    """
    given = read_photo_dates(root / PHOTO_DATES) if (root / PHOTO_DATES).exists() else {}
    names = [unicodedata.normalize("NFC", from_filesystem(str(photo.path.relative_to(root)))) for photo in photos]
    found = np.zeros(len(photos), np.int64)
    for index, (name, photo) in enumerate(zip(names, photos, strict=True)):
        day = next((given[key] for key in ((name, store), (name, "")) if key in given), None)
        found[index] = _from_file(photo.path) if day is None else day
    return found


def read_photo_dates(path: Path) -> Mapping[tuple[str, str], int]:
    """Read a table of photos and their dates.

    Args:
        path: the table.

    Returns:
        The day by photo ('/'-separated path below the table's folder) and store ("" for all stores).

    Raises:
        DataError: it cannot be read, or has invalid rows (all kinds are listed, with lines).
    """
    with reading(f"'{path}'"):
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"'{path}' has {path.stat().st_size:,} bytes, {MAX_BYTES:,} is the most")
        reader = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), skipinitialspace=True)
    found: dict[tuple[str, str], int] = {}
    problems: dict[str, list[int]] = {}
    try:
        columns = [name.strip().lower() for name in next(reader, [])]
        if not {"photo", "date"} <= set(columns):
            raise DataError(f"'{path}': its first line must name the columns photo,date")
        for row in reader:
            cells = dict(zip(columns, [cell.strip() for cell in row] + [""] * len(columns), strict=False))
            photo = unicodedata.normalize("NFC", cells["photo"].replace("\\", "/").removeprefix("./"))
            key, day = (photo, cells.get("store", "")), _parsed(cells["date"])
            if not any(row):
                continue
            problem = (
                "the photo is missing" if not photo
                else "the date is not of the form 2026-11-30" if day is None
                else "the photo already has another date" if found.setdefault(key, day) != day
                else ""
            )  # fmt: skip
            if problem:
                problems.setdefault(problem, []).append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"'{path}' is not a CSV table: {error}") from None
    if problems:
        raise DataError(*(f"'{path}', {at_lines(lines)}: {problem}" for problem, lines in problems.items()))
    return found


def warn_of_undated(dates_N: NDArray[np.int64], *, whose: str) -> None:
    """Log how many photos have no date, and what helps."""
    if undated := int((dates_N == UNKNOWN).sum()):
        logger.warning(
            "%s: %s of %s: sales are not used with them. Add them to %s",
            whose, f"no date is known for {undated:,}", counted(len(dates_N), "photo"), PHOTO_DATES,
        )  # fmt: skip


def _parsed(text: str) -> int | None:
    """The day; `UNKNOWN` for an empty text, None for an invalid one."""
    if not text:
        return UNKNOWN
    try:
        return _plausible(date.fromisoformat(text)) if _DAY.fullmatch(text) else None
    except ValueError:
        return None


def _plausible(day: date) -> int | None:
    return day.toordinal() if _FIRST_YEAR <= day.year <= _LAST_YEAR else None


def _from_file(path: Path) -> int:
    return _from_camera(path) or _from_name(path.name) or UNKNOWN


def _from_camera(path: Path) -> int | None:
    try:
        return _plausible(datetime.strptime(time_taken(read_photo(path))[:10], "%Y:%m:%d").date())
    except (UnreadableFileError, ValueError):
        return None


def _from_name(name: str) -> int | None:
    for year, _, month, day in _IN_NAME.findall(name):
        try:
            return _plausible(date(int(year), int(month), int(day)))
        except ValueError:  # such as 30 February
            continue
    return None
