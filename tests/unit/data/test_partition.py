import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedshelf.core.errors import DataError, UsageError
from fedshelf.data.folder import scan
from fedshelf.data.partition import Mode, Partition, deal, read_assignment, write_stores
from tests.unit.data.samples import pixels, write_pack, write_photo

COUNTS = {"Fruit/Apple": 24, "Fruit/Pear": 16, "Milk": 20, "Bread": 12, "Tea": 20, "Rice": 20}


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    root = tmp_path / "pack"
    for class_path, count in COUNTS.items():
        (root / class_path).mkdir(parents=True)
        for number in range(count):
            (root / class_path / f"{number:03}.jpg").write_bytes(f"{class_path} {number}".encode())
    return root


def dealt(pack: Path, mode: Mode, *, num_stores: int = 4, alpha: float = 0.3, seed: int = 0) -> Partition:
    return deal(pack, mode=mode, num_stores=num_stores, alpha=alpha, seed=seed)


def mix(members: tuple[str, ...]) -> Counter[str]:
    return Counter(member.rpartition("/")[0] for member in members)


@pytest.mark.parametrize("mode", Mode)
def test_the_same_seed_deals_the_same_and_another_seed_otherwise(pack: Path, mode: Mode) -> None:
    assert dealt(pack, mode, seed=1) == dealt(pack, mode, seed=1)
    assert dealt(pack, mode, seed=1) != dealt(pack, mode, seed=2)


@pytest.mark.parametrize("mode", [Mode.IID, Mode.FEATURE])
def test_an_even_deal_gives_every_store_the_same_mix_to_one_photo(pack: Path, mode: Mode) -> None:
    for members in dealt(pack, mode).stores.values():
        assert all(abs(mix(members)[path] - count / 4) < 1 for path, count in COUNTS.items())


def test_a_small_alpha_is_uneven_and_a_large_one_nearly_even(pack: Path) -> None:
    def unevenness(alpha: float) -> float:
        shares = [
            [mix(members)[path] / count for path, count in COUNTS.items()]
            for members in dealt(pack, Mode.DIRICHLET, alpha=alpha).stores.values()
        ]
        return float(np.std(shares))

    assert unevenness(0.3) > 0.2
    assert unevenness(1000) < 0.05


@pytest.mark.parametrize("seed", range(5))
def test_every_store_gets_at_least_a_few_photos_however_uneven(pack: Path, seed: int) -> None:
    partition = dealt(pack, Mode.DIRICHLET, alpha=0.2, seed=seed)
    assert min(len(members) for members in partition.stores.values()) >= 5


def test_an_alpha_that_cannot_feed_every_store_is_a_clear_error(pack: Path) -> None:
    with pytest.raises(DataError, match=r"fewer --stores, or a larger --alpha"):
        dealt(pack, Mode.DIRICHLET, alpha=1e-4, num_stores=12)


def test_an_assortment_is_a_third_of_the_classes_and_each_class_is_sold_somewhere(pack: Path) -> None:
    partition = dealt(pack, Mode.ASSORTMENT, num_stores=6)
    sold = [set(mix(members)) for members in partition.stores.values()]
    assert all(len(classes) == 2 for classes in sold)
    assert set().union(*sold) == set(COUNTS)


def test_more_classes_than_a_third_per_store_still_all_find_a_seller(pack: Path) -> None:
    sold = [set(mix(members)) for members in dealt(pack, Mode.ASSORTMENT, num_stores=2).stores.values()]
    assert set().union(*sold) == set(COUNTS)


def test_only_train_is_dealt_and_its_folder_dropped(tmp_path: Path) -> None:
    pack = write_pack(tmp_path / "pack", {"train/A": 6, "train/B": 6, "val/A": 2, "test/A": 2})
    write_stores(dealt(pack, Mode.IID, num_stores=2), pack, tmp_path / "out")
    found = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png"))
    assert len(found) == 12
    assert all(path.split("/")[1] in {"A", "B"} for path in found)


def test_a_written_store_is_scanned_with_the_classes_of_the_pack(pack: Path, tmp_path: Path) -> None:
    partition = dealt(pack, Mode.IID)
    write_stores(partition, pack, tmp_path / "out")
    for store, members in partition.stores.items():
        found = scan(tmp_path / "out" / store, val_fraction=0, seed=0)
        assert {f"{p.class_path}/{p.path.name}" for p in found.train} == set(members)
        assert all(p.path.read_bytes() == (pack / p.class_path / p.path.name).read_bytes() for p in found.train)


def test_photos_are_hard_links_else_symbolic_links_else_copies(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partition = Partition(stores={"s": ("Milk/000.jpg",)})

    def refuse(*_: object) -> None:
        raise OSError("not on this file system")

    write_stores(partition, pack, tmp_path / "hard")
    assert (tmp_path / "hard/s/Milk/000.jpg").samefile(pack / "Milk/000.jpg")
    assert not (tmp_path / "hard/s/Milk/000.jpg").is_symlink()
    monkeypatch.setattr(os, "link", refuse)
    write_stores(partition, pack, tmp_path / "soft")
    assert (tmp_path / "soft/s/Milk/000.jpg").is_symlink()
    assert (tmp_path / "soft/s/Milk/000.jpg").read_bytes() == b"Milk 0"
    monkeypatch.setattr(os, "symlink", refuse)
    write_stores(partition, pack, tmp_path / "copy")
    assert not (tmp_path / "copy/s/Milk/000.jpg").samefile(pack / "Milk/000.jpg")
    assert (tmp_path / "copy/s/Milk/000.jpg").read_bytes() == b"Milk 0"


def test_links_work_when_the_pack_is_named_by_a_relative_path(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "link", os.symlink)
    write_stores(Partition(stores={"s": ("Milk/000.jpg",)}), Path("pack"), Path("out"))
    assert Path("out/s/Milk/000.jpg").read_bytes() == b"Milk 0"


def test_other_cameras_make_other_photos_of_the_same_products(tmp_path: Path) -> None:
    for number in range(12):
        write_photo(tmp_path / "pack" / "A" / f"{number}.png", 3, 64, 48)
    partition = dealt(tmp_path / "pack", Mode.FEATURE, num_stores=3)
    write_stores(partition, tmp_path / "pack", tmp_path / "out")
    looks = []
    for store in partition.stores:
        photos = [
            np.asarray(Image.open(path)).astype(int) for path in sorted((tmp_path / "out" / store).rglob("*.jpg"))
        ]
        assert [photo.shape for photo in photos] == [(48, 64, 3)] * 4
        assert all(np.array_equal(photo, photos[0]) for photo in photos)
        looks.append(photos[0])
    original = pixels(3, 64, 48).astype(int)
    for i, look in enumerate(looks):
        assert np.abs(look - original).mean() > 3
        assert all(np.abs(look - other).mean() > 3 for other in looks[:i])
        assert np.corrcoef(look.mean(2).ravel(), original.mean(2).ravel())[0, 1] > 0.9


def test_an_unreadable_photo_is_left_out_and_named_where_photos_are_altered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pack = write_pack(tmp_path / "pack", {"A": 5})
    (pack / "A" / "bad.jpg").write_text("no photo")
    write_stores(dealt(pack, Mode.FEATURE, num_stores=1), pack, tmp_path / "out")
    assert len(list((tmp_path / "out").rglob("*.jpg"))) == 5
    assert "bad.jpg" in caplog.text


def test_an_assignment_is_followed(pack: Path, tmp_path: Path) -> None:
    table = tmp_path / "who.csv"
    table.write_text("\ufeffphoto,note,store\nMilk/000.jpg,,north\nTea/001.jpg,x,south\nTea/002.jpg,,north\n")
    partition = read_assignment(table, pack)
    assert partition.stores == {"north": ("Milk/000.jpg", "Tea/002.jpg"), "south": ("Tea/001.jpg",)}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("photo,store\nMilk/999.jpg,s", "line 2: there is no photo 'Milk/999.jpg'"),
        ("photo,shop\nMilk/000.jpg,s", "no column 'store'"),
        ("", "no rows"),
        ("photo,store\n", "no rows"),
        ("photo,store\nMilk/000.jpg,s\nMilk/000.jpg,t", "line 3: photo 'Milk/000.jpg' is there twice"),
        ("photo,store\n../secret.jpg,s", "not a path below the pack"),
        ("photo,store\n/etc/x.jpg,s", "not a path below the pack"),
        ("photo,store\nMilk/000.jpg,../../home", "cannot be a store's name"),
        ("photo,store\nMilk/000.jpg,", "cannot be a store's name"),
        ("photo,store\nMilk/000.jpg", "cannot be a store's name"),
        ("photo,store\nloose.jpg,s", "lies in no class folder"),
    ],
)
def test_an_assignment_that_does_not_fit_is_refused_with_line_and_reason(
    pack: Path, tmp_path: Path, rows: str, words: str
) -> None:
    (pack / "loose.jpg").touch()
    (pack.parent / "secret.jpg").touch()
    (tmp_path / "who.csv").write_text(rows)
    with pytest.raises(DataError, match=r"who\.csv") as raised:
        read_assignment(tmp_path / "who.csv", pack)
    assert words in str(raised.value)


def test_an_existing_folder_with_something_in_it_is_not_touched(pack: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="exists already"):
        write_stores(dealt(pack, Mode.IID), pack, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_when_writing_fails_nothing_is_left(pack: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    too_long = "s" * 300  # for the name of a folder
    with pytest.raises(DataError, match="nothing of it is kept"):
        write_stores(Partition(stores={"s": ("Milk/000.jpg",), too_long: ("Milk/001.jpg",)}), pack, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_photo_that_cannot_be_read_is_named_and_left_out(
    pack: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (pack / "Milk" / "one.jpg").symlink_to("other.jpg")
    (pack / "Milk" / "other.jpg").symlink_to("one.jpg")
    members = ("Milk/000.jpg", "Milk/gone.jpg", "Milk/one.jpg")
    write_stores(Partition(stores={"s": members}), pack, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "s" / "Milk").iterdir()] == ["000.jpg"]
    assert "gone.jpg' cannot be used and is left out" in caplog.text
    assert "one.jpg' cannot be used and is left out: Too many levels" in caplog.text


def test_names_that_are_not_utf8_are_dealt_as_they_are_and_can_be_assigned(tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    for name in (b"\xc4\xfb", b"\xce\xf7"):
        write_pack(pack / os.fsdecode(name), {".": 3})
    write_stores(deal(pack, mode=Mode.IID, num_stores=1, alpha=1, seed=0), pack, tmp_path / "dealt")
    assert sorted(os.fsencode(path.name) for path in (tmp_path / "dealt" / "store-1").iterdir()) == [
        b"\xc4\xfb",
        b"\xce\xf7",
    ]
    (tmp_path / "who.csv").write_text("photo,store\n\\xc4\\xfb/000.png,x\n")
    assigned = read_assignment(tmp_path / "who.csv", pack)
    write_stores(assigned, pack, tmp_path / "assigned")
    assert [os.fsencode(path.name) for path in (tmp_path / "assigned" / "x").iterdir()] == [b"\xc4\xfb"]


def test_two_photos_that_would_get_the_same_place_are_an_error(tmp_path: Path) -> None:
    pack = write_pack(tmp_path / "pack", {"train/A": 1, "val/A": 1})
    with pytest.raises(DataError, match="two photos of store 's'"):
        write_stores(Partition(stores={"s": ("train/A/000.png", "val/A/000.png")}), pack, tmp_path / "out")


@pytest.mark.parametrize(("num_stores", "alpha"), [(0, 0.3), (4, 0.0), (4, float("nan")), (4, float("inf"))])
def test_senseless_numbers_are_refused(pack: Path, num_stores: int, alpha: float) -> None:
    with pytest.raises(UsageError, match=r"--stores|--alpha"):
        dealt(pack, Mode.DIRICHLET, num_stores=num_stores, alpha=alpha)


def test_more_stores_than_photos_are_a_clear_error(pack: Path) -> None:
    with pytest.raises(DataError, match="too few for 500 stores"):
        dealt(pack, Mode.IID, num_stores=500)
