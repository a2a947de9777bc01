from pathlib import Path

import pytest

from fedshelf.core.class_folder import problem_with
from fedshelf.core.errors import DataError
from fedshelf.core.messages import ClassFolder
from fedshelf.data.catalogue import Catalogue, load_aliases
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
        ('{"format":1,"classes":[{"name":"A\\udce4","members":[]}]}', "surrogates not allowed"),
        ("[" * 100_000, "RecursionError"),
        ('{"format":1,"classes":[{"name":"A","members":["x"]},{"name":"B","members":["x"]}]}', "two classes"),
    ],
)
def test_a_text_that_is_no_catalogue_is_refused_with_the_reason(text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Catalogue.from_json(text)


def test_paths_of_any_depth_are_told_apart_without_recursion() -> None:
    deep = "/".join("a" * 3000)
    catalogue = Catalogue.resolve({"a": classes(f"x/{deep}", f"y/{deep}"), "b": classes(f"x/{deep}")})
    assert catalogue.names == (f"x/{deep}", f"y/{deep}")


@pytest.mark.parametrize(
    ("sizes", "shared", "who"),
    [
        ((12, 20_000), 12, "'store-1' alone brings 19,988"),
        ((12, 14, 9, 1_500), 9, "'store-3' alone brings 1,491"),
        ((12, 14, 9, 150), 9, "'store-3' alone brings 141"),
        ((12, 14, 9, 100), 9, ""),  # few
        ((300, 200, 2_000), 100, ""),  # a hypermarket among supermarkets
        ((2_000, 2_000, 20_000), 2_000, ""),
        ((20_000,), 0, ""),  # a single store is what it is
        ((15_000, 15_000), 0, "30,000 products, more than 20,000"),
    ],
)
def test_a_store_that_alone_brings_far_more_than_the_others_makes_a_catalogue_unusual(
    sizes: tuple[int, ...], shared: int, who: str
) -> None:
    """The stores have their first `shared` products in common."""
    joins = {
        f"store-{n}": classes(*(f"{'' if i < shared else n} product {i}" for i in range(size)))
        for n, size in enumerate(sizes)
    }
    found = Catalogue.resolve(joins).unusual(joins)
    assert (who in found) if who else found == ""


@pytest.mark.parametrize(
    ("paths", "why"),
    [
        ([], "it holds no class folder"),
        (["a"] * 20_001, "20,001 class folders, 20,000 is the most"),
        (["/".join("a" * 33)], "33 folders deep, 32 is the most"),
        (["Fruit//Apple"], "an empty part"),
        (["x" * 1021], "1,021 bytes, 1,020 is the most"),
        (["ä" * 511], "1,022 bytes, 1,020 is the most"),
        (["x" * 1020, "/".join("a" * 32), "ä" * 510], ""),
    ],
)
def test_class_folders_beyond_the_limits_are_refused_with_limit_and_value(paths: list[str], why: str) -> None:
    found = problem_with(classes(*paths))
    assert (why in found) if why else found == ""


def test_a_leaf_that_is_not_the_end_of_its_path_is_refused() -> None:
    assert "its path ends in 'Apple'" in problem_with([ClassFolder(leaf="Pear", path="Fruit/Apple")])


def test_clients_without_classes_give_no_catalogue() -> None:
    with pytest.raises(DataError, match="no class"):
        Catalogue.resolve({"a": []})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.txt", "Milk\nApple\nBread\n"),
        ("classes", "\ufeff# our range\nMilk\n\n Apple \r\nBread"),
        ("classes.csv", "\ufeff# our range\nname\nMilk\n\nApple\r\nBread"),
        ("classes.CSV", "class,coarse\nMilk,1\nApple,2\nBread,3\n"),
        ("classes.csv", 'id, Product\n1, "Milk"\n2, Apple \n3,Bread\n'),
    ],
)
def test_a_list_of_names_is_a_catalogue_in_the_order_of_its_lines(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
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


def test_a_line_of_a_text_file_is_a_name_whatever_is_in_it(tmp_path: Path) -> None:
    names = ("Juice, orange", '"Rye" bread', "label", "Tea; green", "a\\tb", "[red]Milk[/red]")
    (tmp_path / "c.txt").write_text("\n".join(names))
    assert Catalogue.load(tmp_path / "c.txt").names == names


def test_a_csv_table_may_have_commas_in_quoted_names_and_needs_a_header(tmp_path: Path) -> None:
    table = tmp_path / "c.csv"
    table.write_text('class\n"Juice, orange"\nBread\n')
    assert Catalogue.load(table).names == ("Juice, orange", "Bread")
    for text in ("Milk\nBread\n", "class;coarse\nMilk;1\n"):
        table.write_text(text)
        with pytest.raises(DataError, match=r"c\.csv.*first line does not name the columns, such as: class"):
            Catalogue.load(table)


def test_a_key_is_not_taken_for_a_list_of_products(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text("-----BEGIN PRIVATE KEY-----\nMIGH\n-----END PRIVATE KEY-----\n")
    with pytest.raises(DataError, match=r"c\.txt' cannot be used: it holds a key or a certificate"):
        Catalogue.load(path)


def test_a_damaged_catalogue_of_a_run_is_to_be_restored(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.json"
    path.write_text('{"format": 1,')
    with pytest.raises(DataError, match="Restore it from a copy"):
        Catalogue.load(path)


@pytest.mark.parametrize(
    ("content", "words"), [(None, "No such file"), ("K\xe4se\n".encode("latin-1"), "not UTF-8 text; save it as UTF-8")]
)
def test_a_catalogue_file_that_cannot_be_read_is_a_clear_error(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "c.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"c\.txt' cannot be read: .*{words}"):
        Catalogue.load(tmp_path / "c.txt")


def test_aliases_unite_names_also_within_a_store_and_for_later_ones() -> None:
    joins = {"a": classes("Banana", "Kiwi"), "b": classes("banana", "Fruit/Bananas", "Kiwi")}
    assert Catalogue.resolve(joins).names == ("Banana", "Bananas", "Kiwi", "banana")
    catalogue = Catalogue.resolve(joins, {"banana": "Banana", "Bananas": "Banana", "Chinese gooseberry": "Kiwi"})
    assert catalogue.names == ("Banana", "Kiwi")
    for path in ("Banana", "banana", "Fruit/Bananas", "Obst/banana", "Bananas"):
        assert catalogue.index_of(class_folder(path)) == 0
    assert catalogue.index_of(class_folder("Exotic/Chinese gooseberry")) == 1
    assert Catalogue.from_json(catalogue.to_json()) == catalogue


def test_a_catalogue_that_was_given_takes_aliases_too() -> None:
    given = Catalogue(("Banana", "Kiwi"), (("Banana",), ("Kiwi",)))
    assert given.with_aliases({"banana": "Banana"}).index_of(class_folder("Fruit/banana")) == 0
    with pytest.raises(DataError, match="does not have: Mango"):
        given.with_aliases({"mango": "Mango"})
    with pytest.raises(DataError, match="'Kiwi' cannot be an alias of 'Banana': it is a class"):
        given.with_aliases({"Kiwi": "Banana"})


def test_an_alias_file_is_a_table_of_alias_and_class(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        '\ufeffclass,Alias,who\nBanana, banana,ann\n"Juice, orange",OJ,bob\nLemon,Lemon ,eve\n'
    )
    assert load_aliases(tmp_path / "a.csv") == {"banana": "Banana", "OJ": "Juice, orange", "Lemon ": "Lemon"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must be alias,class"),
        ("banana,Banana\n", "must be alias,class"),
        ("alias,class\nb,B\nb,C\n", "'b' means both 'B' and 'C'"),
        ("alias,class\nb,\n", "no class: b"),
        ("alias,class\na,b\nb,c\n", "b both has an alias and is one"),
    ],
)
def test_an_alias_file_that_says_nothing_or_two_things_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=rf"a\.csv'.*{words}"):
        load_aliases(tmp_path / "a.csv")
