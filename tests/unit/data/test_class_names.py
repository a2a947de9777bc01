"""Names that mean one product, and what the names of all stores together tell."""

import pytest

from fedshelf.core.messages import ClassFolder
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.class_names import federation_doubts, similar_names
from fedshelf.data.folder import class_folder


def doubts(**held: tuple[str, ...]) -> list[str]:
    joins: dict[str, list[ClassFolder]] = {
        store: [class_folder(path) for path in paths] for store, paths in held.items()
    }
    return federation_doubts(joins, Catalogue.resolve(joins))


@pytest.mark.parametrize(
    "names",
    [
        ("Banana", "banana"), ("KIWI", "Kiwi"), ("Lemon", "Lemon "), ("Berry Jam", "berry-jam", "Berry_Jam"),
        ("Apple", "Apples"), ("Tomato", "tomatoes"), ("Berry", "Berries"), ("Cookie", "Cookies"), ("Box", "boxes"),
        ("Kiwi", "Kiwis"), ("Peach", "Peaches"), ("Radish", "Radishes"), ("Glass", "Glasses"), ("Shoe", "Shoes"),
        ("Purée", "Puree"), ("Milk", "Milk\u200b"), ("Milk", "Ｍilk"), ("Straße", "STRASSE"),
        ("Fruit/Red Apple", "fruit/red apples"),
    ],
)  # fmt: skip
def test_names_that_mean_one_product_are_found(names: tuple[str, ...]) -> None:
    assert similar_names(["Bread", *names]) == [sorted(names)]


@pytest.mark.parametrize(
    "names",
    [
        ("Milk 1.5", "Milk 15"), ("Glas", "Glass"), ("柠檬", "西瓜"), ("Apple/Red", "Pear/Red"), ("Peas", "Pear"),
        (r"\xc4\xfb", r"\xce\xf7"), ("Milk [organic]", "Milk [vegan]"), ("กล้วย", "กลวย"), ("Tea", "Teak"),
    ],
)  # fmt: skip
def test_names_of_different_products_are_not(names: tuple[str, ...]) -> None:
    assert similar_names(names) == []


def test_products_that_stores_spell_differently_are_named_with_the_stores() -> None:
    (doubt,) = doubts(lyon=("Banana", "Kiwi"), metz=("banana", "Kiwi"), nice=("Fruit/banana", "Kiwi"))
    assert "'Banana' (in 'lyon') and 'banana' (in 'metz', 'nice')" in doubt
    assert "--aliases" in doubt


def test_a_client_that_brought_a_folder_of_stores_is_named() -> None:
    (doubt,) = doubts(all=("store-1/Banana", "store-2/Banana", "store-2/Kiwi"), lyon=("Banana", "Kiwi"))
    assert doubt.startswith("store 'all' looks like a folder of stores")


def test_stores_without_any_product_in_common_are_named() -> None:
    (doubt,) = doubts(Fruit=("Apple", "Pear"), Vegetables=("Leek",))
    assert doubt.startswith("no two stores have a product in common ('Fruit', 'Vegetables')")


def test_ordinary_stores_raise_no_doubts() -> None:
    assert doubts(lyon=("Fruit/Apple", "Milk"), metz=("Apple",), nice=("Bread", "Milk")) == []
    assert doubts(alone=("Apple", "Milk")) == []
