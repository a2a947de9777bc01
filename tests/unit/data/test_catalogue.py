from pathlib import Path

import pytest

from fedshelf.core.errors import DataError
from fedshelf.core.messages import ClassFolder
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.folder import class_folder


def classes(*paths: str) -> list[ClassFolder]:
    return [class_folder(path) for path in paths]


def test_the_same_leaf_is_the_same_product_however_stores_nest_it() -> None:
    catalogue = Catalogue.resolve({"a": classes("Fruit/Apple/Gala", "Milk"), "b": classes("Gala", "Dairy/Milk")})
    assert catalogue.names == ("Gala", "Milk")
    assert catalogue.members == (("Fruit/Apple/Gala", "Gala"), ("Dairy/Milk", "Milk"))
    assert catalogue.index_of(class_folder("Gala")) == catalogue.index_of(class_folder("Fruit/Apple/Gala")) == 0


def test_a_clash_in_one_store_tells_the_classes_apart_in_all_stores() -> None:
    catalogue = Catalogue.resolve(
        {"a": classes("Fruit/Apple/Red", "Fruit/Pear/Red", "Kiwi"), "b": classes("Apple/Red", "Exotic/Kiwi")}
    )
    assert catalogue.names == ("Apple/Red", "Kiwi", "Pear/Red")
    assert catalogue.index_of(class_folder("Apple/Red")) == catalogue.index_of(class_folder("Fruit/Apple/Red")) == 0


def test_the_suffix_grows_only_for_those_that_it_must_tell_apart() -> None:
    catalogue = Catalogue.resolve({"a": classes("A/X/Red", "B/X/Red", "C/Pear/Red"), "b": classes("D/Pear/Red")})
    assert catalogue.names == ("A/X/Red", "B/X/Red", "Pear/Red")
    assert catalogue.members[2] == ("C/Pear/Red", "D/Pear/Red")


def test_a_path_that_is_a_suffix_of_another_in_its_store_keeps_its_own_name() -> None:
    catalogue = Catalogue.resolve({"a": classes("Red", "Apple/Red")})
    assert catalogue.names == ("Apple/Red", "Red")


def test_a_class_that_appears_later_is_matched_by_its_longest_known_suffix() -> None:
    catalogue = Catalogue.resolve({"a": classes("Apple/Red", "Pear/Red", "Milk")})
    assert catalogue.index_of(class_folder("New/Milk")) == 1
    assert catalogue.index_of(class_folder("New/Pear/Red")) == 2
    assert catalogue.index_of(class_folder("Grape/Red")) is None
    assert catalogue.index_of(class_folder("Bread")) is None


def test_a_suffix_that_longer_names_end_in_too_is_not_guessed() -> None:
    catalogue = Catalogue.resolve({"a": classes("Red", "Apple/Red")})
    assert catalogue.index_of(class_folder("Red")) == 1
    assert catalogue.index_of(class_folder("Grape/Red")) is None


def test_json_round_trip_keeps_the_digest_and_a_change_changes_it() -> None:
    catalogue = Catalogue.resolve({"a": classes("Käse/Gouda", "Milk")})
    again = Catalogue.from_json(catalogue.to_json())
    assert again == catalogue
    assert again.digest == catalogue.digest
    assert Catalogue.resolve({"a": classes("Gouda", "Milk")}).digest != catalogue.digest
    assert Catalogue.resolve({"a": classes("Käse/Gouda")}).digest != catalogue.digest


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "JSON"),
        ("{}", "JSON"),
        ("[1]", "JSON"),
        ('{"format":2,"classes":[]}', "format 2"),
        ('{"format":1,"classes":[]}', "no class"),
        ('{"format":1,"classes":[{"name":3,"members":[]}]}', "not a text"),
        ('{"format":1,"classes":[{"name":"A","members":["x"]},{"name":"B","members":["x"]}]}', "two classes"),
    ],
)
def test_a_text_that_is_no_catalogue_is_refused_with_the_reason(text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Catalogue.from_json(text)


def test_clients_without_classes_give_no_catalogue() -> None:
    with pytest.raises(DataError, match="no class"):
        Catalogue.resolve({"a": []})


@pytest.mark.parametrize(
    "text",
    [
        "Milk\nApple\nBread\n",
        "\ufeff# our range\nname\nMilk\n\nApple\r\nBread",
        "class,coarse\nMilk,1\nApple,2\nBread,3\n",
        '"Milk"\n Apple \nBread',
    ],
)
def test_a_list_of_names_is_a_catalogue_in_the_order_of_its_lines(tmp_path: Path, text: str) -> None:
    path = tmp_path / "classes.csv"
    path.write_text(text, encoding="utf-8")
    catalogue = Catalogue.load(path)
    assert catalogue.names == ("Milk", "Apple", "Bread")
    assert catalogue.index_of(class_folder("Food/Bread")) == 2
    assert catalogue.index_of(class_folder("Fish")) is None


def test_a_saved_catalogue_loads_as_it_was(tmp_path: Path) -> None:
    catalogue = Catalogue.resolve({"a": classes("A/Red", "B/Red")})
    catalogue.save(tmp_path / "catalogue.json")
    assert Catalogue.load(tmp_path / "catalogue.json") == catalogue
    assert [path.name for path in tmp_path.iterdir()] == ["catalogue.json"]


def test_a_list_that_names_a_class_twice_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("Milk\nBread\nMilk\n")
    with pytest.raises(DataError, match=r"c\.txt.*'Milk' is there twice"):
        Catalogue.load(tmp_path / "c.txt")


def test_a_missing_catalogue_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        Catalogue.load(tmp_path / "none.txt")
