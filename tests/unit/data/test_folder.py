from pathlib import Path

import pytest

from fedshelf.core.errors import DataError, UsageError
from fedshelf.data.folder import PhotoFolder, scan
from fedshelf.data.photo_files import Photo
from tests.unit.data.samples import write_pack, write_photo


def names(photos: tuple[Photo, ...]) -> set[str]:
    return {f"{photo.class_path}/{photo.path.name}" for photo in photos}


def scan_all(root: Path) -> PhotoFolder:
    return scan(root, val_fraction=0, seed=0)


def test_the_folder_that_holds_a_photo_is_its_class_at_any_depth(tmp_path: Path) -> None:
    write_photo(tmp_path / "Fruit" / "Apple" / "Red" / "1.png")
    write_photo(tmp_path / "Milk" / "1.png")
    found = scan_all(tmp_path)
    assert [(c.leaf, c.path) for c in found.classes] == [("Red", "Fruit/Apple/Red"), ("Milk", "Milk")]
    assert names(found.train) == {"Fruit/Apple/Red/1.png", "Milk/1.png"}


def test_all_photo_extensions_in_any_case_are_found_and_nothing_else(tmp_path: Path) -> None:
    photos = ["a.jpg", "b.JPEG", "c.Png", "d.webp", "e.BMP", "f.gif", "g.jfif", "h.TIF", "i.tiff", "j.jpe"]
    for name in (*photos, "k.txt", ".l.jpg", "m"):
        (tmp_path / "A").mkdir(exist_ok=True)
        (tmp_path / "A" / name).touch()
    assert [photo.path.name for photo in scan_all(tmp_path).train] == photos


def test_hidden_folders_are_ignored(tmp_path: Path) -> None:
    write_photo(tmp_path / ".thumbs" / "1.png")
    write_photo(tmp_path / "A" / "1.png")
    assert names(scan_all(tmp_path).train) == {"A/1.png"}


def test_links_to_photos_and_folders_are_followed(tmp_path: Path) -> None:
    real = write_photo(tmp_path / "elsewhere" / "1.png")
    root = tmp_path / "store"
    (root / "A").mkdir(parents=True)
    (root / "A" / "linked.png").symlink_to(real)
    (root / "B").symlink_to(real.parent)
    assert names(scan_all(root).train) == {"A/linked.png", "B/1.png"}


def test_a_link_back_up_does_not_loop(tmp_path: Path) -> None:
    write_photo(tmp_path / "A" / "1.png")
    (tmp_path / "A" / "again").symlink_to(tmp_path)
    found = scan_all(tmp_path)
    assert names(found.train) == {"A/1.png"}
    assert found.findings == ("left out: links to a folder above them (1): 'A/again'",)


def test_train_and_val_folders_are_the_split_and_test_is_left_alone(tmp_path: Path) -> None:
    write_pack(tmp_path, {"train/A": 3, "train/B": 2, "val/A": 1, "test/A": 4})
    found = scan(tmp_path, val_fraction=0.5, seed=0)
    assert names(found.train) == {"A/000.png", "A/001.png", "A/002.png", "B/000.png", "B/001.png"}
    assert names(found.validation) == {"A/000.png"}
    assert [c.path for c in found.classes] == ["A", "B"]


def test_a_train_folder_alone_is_split_by_the_fraction(tmp_path: Path) -> None:
    write_pack(tmp_path, {"train/A": 8, "test/A": 4})
    found = scan(tmp_path, val_fraction=0.5, seed=0)
    assert (len(found.train), len(found.validation)) == (4, 4)
    assert names(found.train) | names(found.validation) == {f"A/{i:03}.png" for i in range(8)}


def test_folders_beside_train_are_left_out_and_named(tmp_path: Path) -> None:
    write_pack(tmp_path, {"train/A": 1, "extra/B": 1, "test/A": 1})
    found = scan_all(tmp_path)
    assert names(found.train) == {"A/000.png"}
    assert found.findings == (f"'{tmp_path}' has train/: its other folders are left out: 'extra'",)


def test_a_class_named_train_is_a_class(tmp_path: Path) -> None:
    write_pack(tmp_path, {"train": 2, "bus": 2})
    assert [c.path for c in scan_all(tmp_path).classes] == ["bus", "train"]


def test_photos_directly_in_the_root_are_left_out_and_named(tmp_path: Path) -> None:
    write_photo(tmp_path / "lost.png")
    write_photo(tmp_path / "A" / "1.png")
    found = scan_all(tmp_path)
    assert names(found.train) == {"A/1.png"}
    assert found.findings == ("left out: photos outside of any product's folder (1): 'lost.png'",)


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: (p.mkdir(), write_photo(p / "1.png"))])
def test_a_folder_without_class_photos_is_one_clear_error(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / "store")
    with pytest.raises(DataError, match=r"no photo in a class folder.*Put photos at"):
        scan_all(tmp_path / "store")


def test_a_missing_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere': no such folder"):
        scan_all(tmp_path / "nowhere")


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_senseless_fraction_is_refused(tmp_path: Path, fraction: float) -> None:
    write_pack(tmp_path, {"A": 2})
    with pytest.raises(UsageError, match="--val-fraction"):
        scan(tmp_path, val_fraction=fraction, seed=0)


def test_every_class_gives_its_fraction_to_one_photo(tmp_path: Path) -> None:
    counts = {"A": 40, "B": 15, "C": 3, "D": 1}
    write_pack(tmp_path, counts)
    found = scan(tmp_path, val_fraction=0.2, seed=3)
    for name, count in counts.items():
        kept = sum(photo.class_path == name for photo in found.validation)
        assert abs(kept - 0.2 * count) < 1
        assert kept < count
    assert not set(found.train) & set(found.validation)
    assert len(found.train) + len(found.validation) == sum(counts.values())


def test_the_split_depends_on_the_seed_and_not_on_where_the_folder_lies(tmp_path: Path) -> None:
    write_pack(tmp_path / "here", {"A": 30})
    write_pack(tmp_path / "there", {"A": 30})
    first = scan(tmp_path / "here", val_fraction=0.3, seed=0)
    assert names(first.validation) == names(scan(tmp_path / "there", val_fraction=0.3, seed=0).validation)
    assert names(first.validation) != names(scan(tmp_path / "here", val_fraction=0.3, seed=1).validation)


def test_a_new_photo_moves_at_most_one_other_across(tmp_path: Path) -> None:
    write_pack(tmp_path, {"A": 20, "B": 20})
    before = names(scan(tmp_path, val_fraction=0.25, seed=0).validation)
    write_photo(tmp_path / "A" / "0000-first-of-all.png", 99)
    after = names(scan(tmp_path, val_fraction=0.25, seed=0).validation)
    assert {name for name in before if name.startswith("B")} == {name for name in after if name.startswith("B")}
    assert len(before - after) <= 1
    assert len(after - before) <= 1


def test_a_small_folder_still_gives_a_validation_photo(tmp_path: Path) -> None:
    write_pack(tmp_path, {"A": 2})
    for seed in range(5):
        found = scan(tmp_path, val_fraction=0.01, seed=seed)
        assert (len(found.train), len(found.validation)) == (1, 1)


def test_decomposed_and_composed_names_are_the_same_class(tmp_path: Path) -> None:
    write_photo(tmp_path / "Pur\u0065\u0301e" / "1.png")
    assert scan_all(tmp_path).classes[0].path == "Pur\u00e9e"
