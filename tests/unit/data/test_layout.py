"""The wrong folder is found before it is trained on: certainly wrong is an error, likely wrong a sentence."""

from pathlib import Path

import pytest

from fedshelf.core.errors import DataError, UsageError
from fedshelf.data.folder import PhotoFolder, scan
from fedshelf.data.layout import store_folders
from tests.unit.data.samples import write_pack, write_photo


def scan_all(root: Path) -> PhotoFolder:
    return scan(root, val_fraction=0, seed=0)


@pytest.mark.parametrize(
    "names",
    [
        ("store-1", "store-2"), ("Store 01", "Store 02", "Store 03"), ("Filiale_7", "Filiale_8"), ("门店1", "门店2"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("above", ["", "photos/"])
def test_a_folder_of_numbered_stores_is_not_taken_for_one_store(
    tmp_path: Path, names: tuple[str, ...], above: str
) -> None:
    write_pack(tmp_path, {f"{above}{store}/{product}": 1 for store in names for product in ("Berry-Jam", "Kiwi")})
    with pytest.raises(
        DataError, match=rf"looks like a folder of stores.*'Berry-Jam'.*'{names[0]}'.*fedshelf simulate"
    ):
        scan_all(tmp_path)


def test_a_store_beside_products_is_not_taken_for_one(tmp_path: Path) -> None:
    write_pack(tmp_path, {"Berry-Jam": 2, "Kiwi": 1, "store-1/Berry-Jam": 2})
    with pytest.raises(DataError, match="looks like a folder of stores"):
        scan_all(tmp_path)


def test_stores_with_a_split_each_are_certainly_stores(tmp_path: Path) -> None:
    write_pack(tmp_path, {f"{store}/{part}/A": 1 for store in ("lyon", "metz") for part in ("train", "val")})
    with pytest.raises(DataError, match="looks like a folder of stores"):
        scan_all(tmp_path)


def test_folders_with_the_same_products_are_said_to_look_like_stores(tmp_path: Path) -> None:
    write_pack(tmp_path, {f"{s}/{p}": 1 for s in ("lyon", "metz", "nice") for p in ("A", "B", "C")} | {"oslo/D": 1})
    (finding,) = scan_all(tmp_path).findings
    assert "looks like a folder of stores" in finding
    assert "'lyon', 'metz', 'nice'" in finding


@pytest.mark.parametrize(
    "classes",
    [
        ("Fruit/Apple", "Fruit/Pear", "Vegetables/Carrot", "Vegetables/Leek"),
        ("Apple/Red", "Apple/Green", "Apple/Gala", "Pear/Red", "Pear/Anjou", "Pear/Conference"),
        ("Shop 24 Cola", "Shop 7 Cola"),
        ("Store-1/Milk",),
        ("A",),
    ],
)
def test_groups_of_products_are_not_taken_for_stores(tmp_path: Path, classes: tuple[str, ...]) -> None:
    assert scan_all(write_pack(tmp_path, dict.fromkeys(classes, 1))).findings == ()


@pytest.mark.parametrize("name", ["test", "central_test", "Val", "validation", "hold-out", "Test Set"])
def test_photos_to_test_on_beside_products_are_not_trained_on(tmp_path: Path, name: str) -> None:
    write_pack(tmp_path, {"Banana": 2, "Kiwi": 2, f"{name}/Banana": 1})
    with pytest.raises(DataError, match=rf"holds '{name}' next to other folders with the same products \('Banana'\)"):
        scan_all(tmp_path)


@pytest.mark.parametrize("counts", [{"Train/A": 2, "Test/A": 1}, {"train": 2, "test": 2}])
def test_a_split_that_is_none_of_ours_is_not_taken_for_products(tmp_path: Path, counts: dict[str, int]) -> None:
    with pytest.raises(DataError, match=r"into '.*/train'|such as '.*/train/PRODUCT/NAME.jpg'"):
        scan_all(write_pack(tmp_path, counts))


def test_other_products_below_a_folder_called_test_are_said_to_be_trained_on(tmp_path: Path) -> None:
    write_pack(tmp_path, {"Aspirin": 2, "Tests/Pregnancy test": 1})
    assert scan_all(tmp_path).findings == (
        f"'{tmp_path}/Tests' is called like photos to test on, but would be trained on",
    )


def write_labels(folder: Path, text: str, *, name: str = "labels.csv") -> None:
    (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    "text",
    ["filename,label\n000.png,Banana\n001.png,Kiwi\n", "id;class\n000;Banana\n001;Kiwi\n",
     "image\tcategory\nimages/000.png\tBanana\nimages/001.png\tKiwi\n"],
)  # fmt: skip
@pytest.mark.parametrize("where", [".", "pictures"])
def test_photos_that_a_file_labels_are_not_taken_for_one_product(tmp_path: Path, text: str, where: str) -> None:
    write_pack(tmp_path, {"pictures": 2})
    write_labels(tmp_path / where, text)
    with pytest.raises(
        DataError, match=r"labels\.csv' names photos that all lie in one folder.*a folder for each product"
    ):
        scan_all(tmp_path)


def test_labels_of_photos_directly_in_the_folder_are_named_too(tmp_path: Path) -> None:
    write_photo(tmp_path / "000.png")
    write_photo(tmp_path / "001.png")
    write_labels(tmp_path, "photo,product\n000.png,Banana\n001.png,Kiwi\n")
    with pytest.raises(DataError, match=r"labels\.csv' names photos"):
        scan_all(tmp_path)


def test_a_split_with_a_table_of_labels_beside_it_is_found(tmp_path: Path) -> None:
    write_pack(tmp_path, {"train/images": 2})
    write_labels(tmp_path, "file,label\n000.png,Banana\n001.png,Kiwi\n", name="train.csv")
    with pytest.raises(DataError, match=r"train\.csv' names photos"):
        scan_all(tmp_path)


def test_a_table_that_does_not_say_what_it_is_is_a_doubt(tmp_path: Path) -> None:
    write_pack(tmp_path, {"Banana": 2})
    write_labels(tmp_path / "Banana", "000.png,2024-05-01\n001.png,2024-05-02\n")
    assert any("names photos that all lie in one folder" in finding for finding in scan_all(tmp_path).findings)


def test_tables_about_other_things_are_left_alone(tmp_path: Path) -> None:
    write_pack(tmp_path, {"Banana": 2, "Kiwi": 1})
    write_labels(tmp_path, "file,label\nBanana/000.png,Banana\nBanana/001.png,Banana\nKiwi/000.png,Kiwi\n")
    write_labels(tmp_path / "Banana", "price,product\n1.20,Banana\n", name="prices.csv")
    assert scan_all(tmp_path).findings == ("left out: files that are not read as photos: 2 .csv",)


def test_a_folder_that_is_called_images_is_said_to_be_the_only_product(tmp_path: Path) -> None:
    assert scan_all(write_pack(tmp_path, {"images": 3})).findings == (
        "all photos (3) lie in a folder 'images', which would be the only product",
    )


def test_products_equal_but_for_case_blanks_or_plural_are_named(tmp_path: Path) -> None:
    write_pack(tmp_path, dict.fromkeys(("Banana", "bananas", "Berry-Jam", "berry jam ", "Fruit/Banana", "Kiwi"), 1))
    (finding,) = scan_all(tmp_path).findings
    assert finding.startswith("class names equal but for case")
    assert "'Banana', 'bananas'; 'Berry-Jam', 'berry jam '" in finding
    assert "Kiwi" not in finding


def test_folders_inside_a_products_folder_are_named(tmp_path: Path) -> None:
    write_pack(tmp_path, {"Banana": 1, "Banana/thumbs/small": 1, "Fruit/Kiwi": 1, "Fruit/Kiwi-Gold": 1})
    assert scan_all(tmp_path).findings == (
        "folders inside a product's folder, taken as products of their own (1): 'Banana/thumbs/small'",
    )


def test_stores_to_simulate_are_the_folders_of_a_folder(tmp_path: Path) -> None:
    write_pack(tmp_path, {"oslo/A": 1, "lyon/A": 1, "@eaDir/A": 1, ".git/A": 1})
    assert store_folders(tmp_path) == {"lyon": tmp_path / "lyon", "oslo": tmp_path / "oslo"}


@pytest.mark.parametrize("name", ["test", "central_test", "train", "Validation"])
def test_photos_to_test_on_are_not_simulated_as_a_store(tmp_path: Path, name: str) -> None:
    write_pack(tmp_path, {"lyon/A": 1, f"{name}/A": 1})
    with pytest.raises(DataError, match=rf"holds '{name}' next to other folders.*--test-dir"):
        store_folders(tmp_path)


def test_one_store_is_not_simulated_as_many(tmp_path: Path) -> None:
    write_pack(tmp_path, {"Banana": 2, "Kiwi": 2})
    with pytest.raises(
        DataError, match=r"looks like one store's folder, .*products in 'Banana', 'Kiwi'.*data partition"
    ):
        store_folders(tmp_path)


def test_one_store_with_a_folder_inside_a_product_is_not_simulated_as_many_either(tmp_path: Path) -> None:
    write_pack(tmp_path, {"Banana": 2, "Kiwi": 2, "Tea": 2, "Tea/old": 1})
    with pytest.raises(DataError, match=r"looks like one store's folder, .*products in 'Banana', 'Kiwi'"):
        store_folders(tmp_path)


@pytest.mark.parametrize(("folders", "warns"), [
    ({"Fruit/Apple": 1, "Fruit/Pear": 1, "Dairy/Milk": 1}, True), ({"lyon/A": 1, "oslo/B": 1}, False),
    ({"lyon/A": 1, "lyon/B": 1, "oslo/A": 1}, False), ({"lyon/A": 1, "lyon/B": 1}, False),
])  # fmt: skip
def test_groups_of_products_that_are_taken_for_stores_are_a_warning(
    tmp_path: Path, folders: dict[str, int], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    write_pack(tmp_path, folders)
    store_folders(tmp_path)
    assert ["no product is in two of its folders" in message for message in caplog.messages] == [True] * warns


def test_a_place_without_stores_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        store_folders(tmp_path / "x")
    (tmp_path / "x").mkdir()
    with pytest.raises(DataError, match="contains no folders"):
        store_folders(tmp_path / "x")
