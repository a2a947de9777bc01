"""What is taken for a photo of a product, and what is passed over and named."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fedshelf.core.errors import DataError
from fedshelf.core.system_errors import user_name
from fedshelf.data.folder import scan
from fedshelf.data.health import check
from fedshelf.data.photo_files import Listing, list_photos, subfolders
from tests.unit.data.samples import write_pack, write_photo
from tests.users import ordinary_user


def classes(listing: Listing) -> list[str]:
    return sorted({photo.class_path for photo in listing.photos})


def raw_folder(root: Path, name: bytes) -> Path:
    return root / os.fsdecode(name)


@pytest.mark.parametrize(
    "name",
    [
        "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__MACOSX",
        "#snapshot", "@tmp",
    ],
)  # fmt: skip
def test_folders_of_a_nas_or_a_system_are_named_and_hold_no_products(tmp_path: Path, name: str) -> None:
    write_pack(tmp_path, {"Banana": 2, f"Banana/{name}/p00.jpg": 1, f"{name}/Kiwi": 1})
    listing = list_photos(tmp_path)
    assert classes(listing) == ["Banana"]
    (finding,) = listing.findings()
    assert finding.startswith("left out: folders that a NAS or an operating system keeps for itself (2): ")
    assert f"'Banana/{name}'" in finding
    assert f" '{name}'" in finding


def test_hidden_folders_and_folders_named_like_photos_are_named(tmp_path: Path) -> None:
    write_pack(
        tmp_path, {"Banana": 1, "Banana/.thumbnails": 1, "Banana/.@__thumb": 1, "Banana/p00.JPG": 1, "p1.heic": 1}
    )
    write_photo(tmp_path / "Banana" / "._p00.png")
    listing = list_photos(tmp_path)
    assert classes(listing) == ["Banana"]
    assert listing.findings() == [
        "left out: folders with a photo's name (2): 'Banana/p00.JPG', 'p1.heic'",
        "left out: hidden folders (2): 'Banana/.@__thumb', 'Banana/.thumbnails'",
        "left out: hidden photos (1): 'Banana/._p00.png'",
    ]


def test_files_that_are_no_photos_are_counted_by_their_endings(tmp_path: Path) -> None:
    write_pack(tmp_path, {"Banana": 1})
    for name in ("Thumbs.db", "notes.txt", "more.TXT", "IMG_1.DNG", "README", ".DS_Store"):
        (tmp_path / "Banana" / name).touch()
    (finding,) = list_photos(tmp_path).findings()
    assert finding == "left out: files that are not read as photos: 1 without an ending, 1 .db, 1 .dng, 2 .txt"


def test_folders_without_a_photo_are_named(tmp_path: Path) -> None:
    write_pack(tmp_path, {"Fruit/Banana": 1})
    for folder in ("Fruit/Kiwi", "Milk", "@eaDir", "Fruit/.hidden"):
        (tmp_path / folder).mkdir()
    (tmp_path / "Milk" / "price.txt").touch()
    assert "left out: folders without a photo (2): 'Fruit/Kiwi', 'Milk'" in list_photos(tmp_path).findings()
    assert "left out: folders without a photo (2)" in " ".join(check(tmp_path).findings)


def test_links_in_a_circle_and_links_that_lead_nowhere_are_named_and_passed_over(tmp_path: Path) -> None:
    write_pack(tmp_path, {"Banana": 2, "Kiwi": 2})
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "Kiwi" / "gone").symlink_to("nowhere")
    (tmp_path / "Banana" / "a.jpg").symlink_to("b.jpg")
    (tmp_path / "Banana" / "b.jpg").symlink_to("a.jpg")
    listing = list_photos(tmp_path)
    assert listing.findings() == ["left out: links that lead nowhere, or back to themselves (2): 'Kiwi/gone', 'loop'"]
    unreadable = [photo.path.name for photo in listing.photos if not photo.path.exists()]
    assert unreadable == ["a.jpg", "b.jpg"], "what is named like a photo is reported like a damaged one"


def test_sockets_and_pipes_are_no_photos(tmp_path: Path) -> None:
    write_pack(tmp_path, {"Banana": 1})
    os.mkfifo(tmp_path / "Banana" / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "Banana" / "s"))
        assert len(list_photos(tmp_path).photos) == 1


def test_any_depth_of_folders_is_walked(tmp_path: Path) -> None:
    folders = [tmp_path / "d"]
    folders[0].mkdir()
    with contextlib.suppress(OSError):  # a path has at most 4,096 bytes
        for _ in range(sys.getrecursionlimit() + 100):
            (folders[-1] / "d").mkdir()
            folders.append(folders[-1] / "d")
    (tmp_path / "d" / "p.png").touch()
    try:
        assert classes(list_photos(tmp_path)) == ["d"]
    finally:
        (tmp_path / "d" / "p.png").unlink()
        for folder in reversed(folders):  # not every program that tidies up can go so deep
            folder.rmdir()
    assert len(folders) > sys.getrecursionlimit()


def test_products_whose_names_are_not_utf8_stay_apart(tmp_path: Path) -> None:
    for name in ("柠檬".encode("gbk"), "西瓜".encode("gbk")):
        write_pack(raw_folder(tmp_path, name), {".": 2})
    found = scan(tmp_path, val_fraction=0.5, seed=0)
    assert [folder.path for folder in found.classes] == [r"\xc4\xfb\xc3\xca", r"\xce\xf7\xb9\xcf"]
    assert all(photo.path.is_file() for photo in found.train)
    assert "folder names that are not UTF-8 (2)" in found.findings[0]
    assert "convmv" in found.findings[0]


def test_folders_whose_names_are_the_same_in_unicode_are_one_product_and_named(tmp_path: Path) -> None:
    write_pack(tmp_path, {"Pur\u0065\u0301e": 1, "Pur\u00e9e": 1})
    listing = list_photos(tmp_path)
    assert classes(listing) == ["Pur\u00e9e"]
    assert "is the name of several folders (2)" in listing.findings()[0]


def test_a_folder_that_may_not_be_read_is_named_with_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pack(tmp_path, {"A": 1, "B": 1})
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "B").chmod(0)
    try:
        with ordinary_user() as uid:
            listing = list_photos(Path())
    finally:
        (tmp_path / "B").chmod(0o700)
    assert classes(listing) == ["A"]
    (finding,) = listing.findings()
    assert finding.startswith("left out: folders that cannot be read (1): 'B (Permission denied; allow ")
    assert f"allow {user_name(uid)} to read it" in finding


@pytest.mark.parametrize("closed", ["store", "store/train", "store/val"])
def test_a_part_of_the_data_folder_that_may_not_be_read_is_an_error_that_names_it_and_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    write_pack(tmp_path, {"store/train/A": 2, "store/val/A": 1})
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    Path(closed).chmod(0)
    try:
        with (
            ordinary_user() as uid,
            pytest.raises(DataError, match=rf"'{closed}.*Permission denied; allow {user_name(uid)}"),
        ):
            scan(Path("store"), val_fraction=0, seed=0)
    finally:
        Path(closed).chmod(0o700)


@pytest.mark.parametrize("name", ["no\0thing", "x" * 300])
def test_a_path_that_no_file_system_can_hold_is_an_error(name: str) -> None:
    with pytest.raises(DataError, match=r"photo folder .*(null|too long)"):
        scan(Path(name), val_fraction=0, seed=0)


def test_only_folders_that_may_be_stores_or_products_are_subfolders(tmp_path: Path) -> None:
    write_pack(tmp_path, {"b": 1, "a": 1, "@eaDir": 1, ".git": 1})
    (tmp_path / "file").touch()
    assert [path.name for path in subfolders(tmp_path)] == ["a", "b"]


def test_what_reads_folders_and_catalogues_needs_no_torch() -> None:
    code = (
        "import sys, fedshelf.data.folder, fedshelf.data.catalogue, fedshelf.data.layout\n"
        "print([m for m in ('torch', 'numpy', 'cv2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_its_library_a_heic_photo_is_counted_and_the_extra_named(tmp_path: Path) -> None:
    write_pack(tmp_path, {"Banana": 1})
    (tmp_path / "Banana" / "phone.HEIC").touch()
    code = (
        "import sys; sys.modules['pillow_heif'] = None\n"
        "from pathlib import Path\nfrom fedshelf.data.photo_files import list_photos\n"
        "listing = list_photos(Path(sys.argv[1]))\nprint(len(listing.photos), *listing.findings())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("1 left out: files that are not read as photos: 1 .heic")
    assert "pip install 'fedshelf[heic]'" in done.stdout
