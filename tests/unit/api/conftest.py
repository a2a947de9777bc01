"""Stores for tests of the Python API."""

from pathlib import Path

import pytest

from tests.unit.data.samples import write_pack


@pytest.fixture(autouse=True)
def _stores(home: Path) -> None:
    for name, count in (("lyon", 4), ("oslo", 5)):
        write_pack(Path("stores") / name, {"apple": count, "milk": 4})
    write_pack(Path("test"), {"apple": 3, "milk": 3})
