"""The photo cache: what it returns is what a direct decode returns, whatever happened to its files before."""

import logging
import multiprocessing
import os
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from fedshelf.core.errors import DataError, PolicyError
from fedshelf.data import cache as cache_module
from fedshelf.data.cache import CachedPhotos, PhotoCache
from fedshelf.data.decode import _register_heic, decode
from fedshelf.data.folder import scan
from fedshelf.data.photo_files import Photo
from tests.unit.data.samples import GROCERIES_SMALL, needs_groceries_small, write_pack, write_photo

SIZE = 24
OLD = 1_500_000_000


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_pack(tmp_path / "store", {"A": 4, "B": 3})


@pytest.fixture
def cache(tmp_path: Path) -> PhotoCache:
    return PhotoCache(root=tmp_path / "cache")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The bytes of every photo that the cache decodes; the decoder itself is the real one."""
    seen: list[bytes] = []

    def watched(data: bytes, image_size: int) -> object:
        seen.append(data)
        return decode(data, image_size)

    monkeypatch.setattr(cache_module, "decode", watched)
    return seen


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file whose bytes the cache reads."""
    seen: list[Path] = []
    real = cache_module.read_photo

    def watched(path: Path) -> bytes:
        seen.append(path)
        return real(path)

    monkeypatch.setattr(cache_module, "read_photo", watched)
    return seen


def photos_of(root: Path) -> tuple[Photo, ...]:
    return scan(root, val_fraction=0, seed=0).train


def packs(cache: PhotoCache) -> list[Path]:
    return sorted(cache.root.glob("*/*.rgb"))


def check(cached: CachedPhotos, photos: tuple[Photo, ...]) -> None:
    """Row by row the same as a direct decode."""
    assert cached.images.shape == (len(cached.kept), SIZE, SIZE, 3)
    for row, position in zip(cached.images, cached.kept, strict=True):
        np.testing.assert_array_equal(row, decode(photos[position].path.read_bytes(), SIZE))


def test_the_second_time_nothing_is_decoded(store: Path, cache: PhotoCache, decoded: list[bytes]) -> None:
    photos = photos_of(store)
    check(cache.open(photos, SIZE), photos)
    assert len(decoded) == len(photos)
    check(cache.open(photos, SIZE), photos)
    assert len(decoded) == len(photos)


def test_the_images_are_mapped_and_cannot_be_written(store: Path, cache: PhotoCache) -> None:
    images = cache.open(photos_of(store), SIZE).images
    assert isinstance(images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        images[0, 0, 0, 0] = 1


def test_a_new_photo_is_the_only_one_decoded(store: Path, cache: PhotoCache, decoded: list[bytes]) -> None:
    cache.open(photos_of(store), SIZE)
    decoded.clear()
    new = write_photo(store / "A" / "0000.png", 77)
    check(cache.open(photos_of(store), SIZE), photos_of(store))
    assert decoded == [new.read_bytes()]


def test_a_changed_photo_is_done_again_and_no_other(store: Path, cache: PhotoCache, decoded: list[bytes]) -> None:
    cache.open(photos_of(store), SIZE)
    decoded.clear()
    changed = write_photo(store / "B" / "001.png", 78)
    check(cache.open(photos_of(store), SIZE), photos_of(store))
    assert decoded == [changed.read_bytes()]


def test_a_removed_photo_costs_no_decoding(store: Path, cache: PhotoCache, decoded: list[bytes]) -> None:
    cache.open(photos_of(store), SIZE)
    decoded.clear()
    (store / "A" / "001.png").unlink()
    check(cache.open(photos_of(store), SIZE), photos_of(store))
    assert decoded == []


def test_files_that_have_not_changed_are_not_even_read(store: Path, cache: PhotoCache, hashed: list[Path]) -> None:
    photos = photos_of(store)
    for photo in photos:
        os.utime(photo.path, (OLD, OLD))
    cache.open(photos, SIZE)
    hashed.clear()
    os.utime(photos[0].path, (OLD + 1, OLD + 1))
    cache.open(photos, SIZE)
    assert hashed == [photos[0].path]


def test_a_change_within_the_same_time_stamp_is_seen(store: Path, cache: PhotoCache) -> None:
    target = photos_of(store)[0].path.with_suffix(".bmp")
    write_photo(target, 1)
    stamp = target.stat().st_mtime_ns
    cache.open(photos_of(store), SIZE)
    inode = target.stat().st_ino
    target.write_bytes(write_photo(store.parent / "other.bmp", 2).read_bytes())
    os.utime(target, ns=(stamp, stamp))
    assert (target.stat().st_ino, target.stat().st_mtime_ns) == (inode, stamp)
    check(cache.open(photos_of(store), SIZE), photos_of(store))


def test_a_photo_reached_by_links_from_other_stores_is_decoded_once(
    store: Path, cache: PhotoCache, decoded: list[bytes], tmp_path: Path
) -> None:
    (tmp_path / "b" / "A").mkdir(parents=True)
    (tmp_path / "c" / "A").mkdir(parents=True)
    for photo in photos_of(store):
        name = f"{photo.class_path}-{photo.path.name}"
        (tmp_path / "b" / "A" / name).hardlink_to(photo.path)
        (tmp_path / "c" / "A" / name).symlink_to(photo.path)
    for root in (store, tmp_path / "b", tmp_path / "c"):
        check(cache.open(photos_of(root), SIZE), photos_of(root))
    assert len(decoded) == len(photos_of(store))


def test_another_image_size_is_another_pack(store: Path, cache: PhotoCache) -> None:
    photos = photos_of(store)
    assert cache.open(photos, 16).images.shape[1:] == (16, 16, 3)
    check(cache.open(photos, SIZE), photos)
    assert cache.open(photos, 16).images.shape[1:] == (16, 16, 3)


def test_a_cache_stays_below_its_ceiling_and_forgets_what_was_not_used_for_longest(
    store: Path, cache: PhotoCache
) -> None:
    photos = photos_of(store)
    bytes_of = {size: len(photos) * size**2 * 3 for size in (8, 16, 24)}
    bounded = PhotoCache(root=cache.root, max_bytes=bytes_of[8] + bytes_of[24])
    for size in (16, 8, 24):
        assert bounded.open(photos, size).images.shape == (len(photos), size, size, 3)
    assert sorted(path.stat().st_size for path in packs(cache)) == [bytes_of[8], bytes_of[24]]
    with pytest.raises(PolicyError, match="max-cache-mb"):
        bounded.open(photos, 64)
    assert len(packs(cache)) == 2
    assert bounded.open(photos, 16).images.shape == (len(photos), 16, 16, 3)


def test_the_order_of_the_photos_is_the_order_of_the_rows(store: Path, cache: PhotoCache) -> None:
    photos = photos_of(store)
    cache.open(photos, SIZE)
    check(cache.open(photos[::-1], SIZE), photos[::-1])


def test_bad_files_are_counted_named_with_their_reason_and_left_out(
    store: Path, cache: PhotoCache, caplog: pytest.LogCaptureFixture
) -> None:
    (store / "A" / "empty.jpg").touch()
    (store / "A" / "text.jpg").write_text("no photo")
    (store / "A" / "gone.jpg").symlink_to(store / "nowhere.jpg")
    os.mkfifo(store / "A" / "pipe.jpg")
    photos = photos_of(store)
    with caplog.at_level(logging.WARNING):
        cached = cache.open(photos, SIZE)
    check(cached, photos)
    reasons = {problem.path.name: problem.reason for problem in cached.problems}
    assert set(reasons) == {"empty.jpg", "text.jpg", "gone.jpg", "pipe.jpg"}
    assert "empty" in reasons["empty.jpg"]
    assert "not a JPEG" in reasons["text.jpg"]
    assert "cannot be read" in reasons["gone.jpg"]
    assert "not a regular file" in reasons["pipe.jpg"]
    assert f"4 of {len(photos)} photos" in caplog.text
    assert all(name in caplog.text for name in reasons)


def test_a_bad_file_is_not_tried_again_but_named_again_until_it_is_mended(
    store: Path, cache: PhotoCache, decoded: list[bytes]
) -> None:
    bad = store / "A" / "bad.jpg"
    bad.write_text("no photo")
    cache.open(photos_of(store), SIZE)
    decoded.clear()
    assert [problem.path for problem in cache.open(photos_of(store), SIZE).problems] == [bad]
    assert decoded == []
    write_photo(bad, 5)
    assert cache.open(photos_of(store), SIZE).problems == ()


def test_an_implausibly_large_file_is_not_read(store: Path, cache: PhotoCache) -> None:
    with (store / "A" / "large.jpg").open("wb") as file:
        file.truncate(cache_module.MAX_FILE_BYTES + 1)
    assert "too large" in cache.open(photos_of(store), SIZE).problems[0].reason


def test_no_usable_photo_at_all_is_one_clear_error_unless_allowed(tmp_path: Path, cache: PhotoCache) -> None:
    (tmp_path / "store" / "A").mkdir(parents=True)
    (tmp_path / "store" / "A" / "bad.jpg").write_text("no photo")
    photos = photos_of(tmp_path / "store")
    for _ in range(2):
        with pytest.raises(DataError, match=r"can be used: .*damaged \(1 photo\)\. 'fedshelf data check' names them"):
            cache.open(photos, SIZE)
    assert len(cache.open(photos, SIZE, allow_empty=True).images) == 0


def test_a_photo_whose_decoder_is_missing_is_tried_again_once_it_is_installed(
    tmp_path: Path, cache: PhotoCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    pillow_heif.register_heif_opener()
    photos = photos_of(write_photo(tmp_path / "store" / "A" / "1.heic").parents[1])
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pillow_heif", None)
        _register_heic.cache_clear()
        (problem,) = cache.open(photos, SIZE, allow_empty=True).problems
        assert "pip install 'fedshelf[heic]'" in problem.reason
    assert cache.open(photos, SIZE).images.shape == (1, SIZE, SIZE, 3)


def test_no_photos_give_an_empty_array(cache: PhotoCache) -> None:
    assert cache.open((), SIZE).images.shape == (0, SIZE, SIZE, 3)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
def test_a_damaged_pack_is_made_again(store: Path, cache: PhotoCache, damage: str) -> None:
    photos = photos_of(store)
    cache.open(photos, SIZE)
    (pack,) = packs(cache)
    data = bytearray(pack.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    pack.unlink()
    if damage != "remove":
        pack.write_bytes({"flip": bytes(data), "truncate": bytes(data[:-1]), "empty": b""}[damage])
    check(cache.open(photos, SIZE), photos)


def test_a_damaged_pack_is_not_copied_from(store: Path, cache: PhotoCache) -> None:
    cache.open(photos_of(store), SIZE)
    (pack,) = packs(cache)
    data = bytearray(pack.read_bytes())
    data[0] ^= 255
    pack.write_bytes(data)
    write_photo(store / "A" / "new.png", 70)
    check(cache.open(photos_of(store), SIZE), photos_of(store))


@pytest.mark.parametrize("damage", [b"", b"this is not a database, not at all" * 100, None])
def test_a_damaged_index_is_made_again(store: Path, cache: PhotoCache, damage: bytes | None) -> None:
    photos = photos_of(store)
    cache.open(photos, SIZE)
    index = cache.root / "index.sqlite"
    if damage is None:
        data = bytearray(index.read_bytes())
        data[100:3000] = bytes(2900)
        index.write_bytes(data)
    else:
        index.write_bytes(damage)
    check(cache.open(photos, SIZE), photos)


def test_leftovers_of_a_crash_are_removed_once_they_are_old(store: Path, cache: PhotoCache) -> None:
    cache.open(photos_of(store), SIZE)
    folder = packs(cache)[0].parent
    young, old = folder / "young.tmp", folder / "old.tmp"
    young.touch()
    old.touch()
    os.utime(old, (OLD, OLD))
    write_photo(store / "A" / "new.png", 70)
    cache.open(photos_of(store), SIZE)
    assert young.exists()
    assert not old.exists()


def test_a_pack_that_newer_ones_replace_is_removed_after_a_week(
    store: Path, cache: PhotoCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.open(photos_of(store), SIZE)
    (first,) = packs(cache)
    write_photo(store / "A" / "new.png", 70)
    cache.open(photos_of(store), SIZE)
    assert first in packs(cache)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 8 * 86_400)
    write_photo(store / "A" / "newer.png", 71)
    check(cache.open(photos_of(store), SIZE), photos_of(store))
    assert first not in packs(cache)


def test_the_cache_is_for_its_owner_alone(store: Path, cache: PhotoCache) -> None:
    cache.open(photos_of(store), SIZE)
    for folder in (cache.root, packs(cache)[0].parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def open_in_a_process(root: Path, store: Path, results: "multiprocessing.Queue[object]") -> None:
    try:
        photos = photos_of(store)
        check(PhotoCache(root=root).open(photos, SIZE), photos)
        results.put("fine")
    except BaseException as error:
        results.put(repr(error))
        raise


def test_processes_that_build_at_the_same_time_all_get_their_photos(tmp_path: Path) -> None:
    write_pack(tmp_path / "store", {"A": 30, "B": 30})
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[object] = context.Queue()
    workers = [
        context.Process(target=open_in_a_process, args=(tmp_path / "cache", tmp_path / "store", results))
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    outcomes = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert outcomes == ["fine"] * 3


_UNDER_A_FILE_SIZE_LIMIT = """
import resource, sys
from pathlib import Path
from fedshelf.core.errors import DataError, PolicyError
from fedshelf.data.cache import PhotoCache
from fedshelf.data.folder import scan
photos = scan(Path(sys.argv[1]), val_fraction=0, seed=0).train
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
try:
    PhotoCache(root=Path(sys.argv[2])).open(photos, 200)
except DataError as error:
    print(error)
"""


def test_a_full_disk_is_one_clear_error_and_leaves_no_rubbish(store: Path, cache: PhotoCache) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _UNDER_A_FILE_SIZE_LIMIT, str(store), str(cache.root)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "the disk is full: free space or put the cache elsewhere" in done.stdout
    assert not list(cache.root.glob("*/*"))
    check(cache.open(photos_of(store), SIZE), photos_of(store))


def test_a_place_that_cannot_be_a_folder_is_one_clear_error(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be used.*elsewhere"):
        PhotoCache(root=tmp_path / "file").open(photos_of(store), SIZE)


@pytest.fixture(scope="module")
def real_photos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Photo, ...]:

    folder = tmp_path_factory.mktemp("groceries")
    with tarfile.open(GROCERIES_SMALL) as archive:
        archive.extractall(folder, filter="data")
    (train,) = folder.glob("**/train")
    return scan(train.parent, val_fraction=0, seed=0).train


@pytest.mark.real_data
@needs_groceries_small
def test_real_photos_come_out_of_the_cache_as_pillow_sees_them(
    real_photos: tuple[Photo, ...], cache: PhotoCache
) -> None:
    cached = cache.open(real_photos, 48)
    assert (len(cached.images), cached.problems) == (300, ())
    for row, photo in list(zip(cached.images, real_photos, strict=True))[::10]:
        with Image.open(photo.path) as image:
            expected = np.asarray(image.convert("RGB").resize((48, 48), Image.Resampling.BOX))
        assert np.abs(row.astype(int) - expected.astype(int)).mean() < 4
