"""Blobs kept on disk by digest."""

import os
import stat
from pathlib import Path

import pytest
import torch

from fedshelf.serialization import blob as blobs
from fedshelf.serialization.blob import Blob
from fedshelf.storage.blob_cache import MOST_KEPT, BlobCache


def blob(number: int = 0) -> Blob:
    return blobs.write({"frozen": torch.arange(1000.0) + number})


def test_a_blob_is_found_by_another_process_and_run(tmp_path: Path) -> None:
    kept = blob()
    assert BlobCache(tmp_path / "models").find(kept.digest) is None
    BlobCache(tmp_path / "models").save(kept)
    found = BlobCache(tmp_path / "models").find(kept.digest)
    assert found is not None
    assert torch.equal(blobs.read(found)["frozen"], torch.arange(1000.0))
    (file,) = (tmp_path / "models").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_damaged_blob_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, kept = BlobCache(tmp_path), blob()
    cache.save(kept)
    (tmp_path / kept.digest).write_bytes(kept.join()[:-1] + b"x")
    assert cache.find(kept.digest) is None
    assert "received again" in caplog.text
    cache.save(kept)
    assert cache.find(kept.digest) is not None


def test_the_blob_unused_for_longest_makes_room(tmp_path: Path) -> None:
    cache, many = BlobCache(tmp_path), [blob(number) for number in range(MOST_KEPT + 1)]
    for age, one in enumerate(many[:-1]):
        cache.save(one)
        os.utime(tmp_path / one.digest, (1e9 + age, 1e9 + age))
    assert cache.find(many[0].digest) is not None, "used now"
    cache.save(many[-1])
    assert [cache.find(one.digest) is not None for one in many] == [True, False, True, True, True]


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "x.y"])
def test_a_name_that_is_no_digest_is_no_path(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_text("x")
    (tmp_path / "x.y").write_text("x")
    assert BlobCache(tmp_path / "models").find(name) is None
    assert BlobCache(tmp_path).find(name) is None


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "models").write_text("a file")
    BlobCache(tmp_path / "models").save(blob())
    assert "not kept for the next start" in caplog.text
