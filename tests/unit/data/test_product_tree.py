"""The tree of folders above the products, and accuracy at each of its levels."""

import pytest

from fedshelf.core.messages import ClassFolder
from fedshelf.data.catalogue import Catalogue


def catalogue(**stores: str) -> Catalogue:
    """The catalogue of stores with these class paths, separated by spaces."""
    return Catalogue.resolve(
        {
            name: [ClassFolder(leaf=path.rpartition("/")[2], path=path) for path in paths.split()]
            for name, paths in stores.items()
        }
    )


def paths(**stores: str) -> list[str]:
    return list(catalogue(**stores).tree.paths)


def test_flat_folders_have_one_level() -> None:
    tree = catalogue(a="apple milk tea").tree
    assert (tree.depth, tree.nodes(1)) == (1, ("apple", "milk", "tea"))
    assert tree.correct({(0, 0): 3, (0, 1): 2, (2, 2): 1}) == (4,)


def test_a_prediction_is_correct_at_each_level_at_which_it_lies_in_the_same_folder() -> None:
    found = catalogue(a="Fruit/Apple/Gala Fruit/Apple/Pink Fruit/Kiwi Dairy/Milk")
    assert found.names == ("Gala", "Kiwi", "Milk", "Pink")
    assert found.tree.nodes(2) == ("Fruit/Apple", "Fruit/Kiwi", "Dairy/Milk", "Fruit/Apple")
    confusion = {(0, 0): 10, (0, 3): 5, (1, 0): 2, (2, 1): 7, (1, 1): 1}
    assert found.tree.correct(confusion) == (10 + 5 + 2 + 1, 10 + 5 + 1, 10 + 1)


@pytest.mark.parametrize(
    ("stores", "chosen"),
    [
        ({"a": "Milk", "b": "Dairy/Milk"}, ["Dairy/Milk"]),
        ({"a": "Drinks/Milk", "b": "Dairy/Milk"}, ["Dairy/Milk"]),
        ({"a": "Drinks/Milk Drinks/Tea", "b": "Dairy/Milk"}, ["Drinks/Milk", "Drinks/Tea"]),
        ({"a": "shop/Dairy/Milk", "b": "Dairy/Milk Dairy/Curd"}, ["Dairy/Curd", "Dairy/Milk"]),
    ],
)
def test_a_class_that_stores_keep_in_different_folders_lies_in_the_one_with_most_classes(
    stores: dict[str, str], chosen: list[str]
) -> None:
    assert paths(**stores) == chosen
    assert paths(**dict(reversed(stores.items()))) == chosen


def test_a_class_of_a_given_catalogue_lies_where_its_name_says() -> None:
    given = Catalogue(("Apple/Red", "Milk", "Pear/Red"), ((), ("Milk",), ("Pear/Red",)))
    assert given.tree.paths == ("Apple/Red", "Milk", "Pear/Red")
    assert given.tree.nodes(1) == ("Apple", "Milk", "Pear")


def test_a_folder_that_is_a_class_itself_is_told_from_the_classes_in_it() -> None:
    tree = catalogue(a="Fruit Fruit/Kiwi").tree
    assert tree.correct({(0, 1): 2, (1, 1): 3}) == (5, 3)


def test_a_path_of_any_depth_has_at_most_as_many_levels_as_a_message_can_hold() -> None:
    deep = "/".join("x" * 100) + "/milk"
    tree = Catalogue(("milk", "tea"), ((deep,), ("tea",))).tree
    assert tree.depth == 32
    assert tree.correct({(0, 0): 1, (1, 0): 1}) == (1,) * 32
