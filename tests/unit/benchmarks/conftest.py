"""A federation that is small enough for a unit test, on photos of noise."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.workloads import CHAIN, NUM_CLASSES

TINY = replace(CHAIN, num_stores=4, photos_per_store=6, cohort_size=3, num_rounds=2, batch_size=4, num_test=5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The photos of TINY."""
    rng = np.random.default_rng(0)
    for part, count in (("train", TINY.num_stores * TINY.photos_per_store), ("test", TINY.num_test)):
        np.save(tmp_path / f"{part}_images.npy", rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))
        np.save(tmp_path / f"{part}_labels.npy", rng.integers(0, NUM_CLASSES, count))
    return tmp_path
