from hypothesis import given
from hypothesis import strategies as st

from fedshelf.core.messages import ClassFolder
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.folder import class_folder

paths = st.lists(st.sampled_from("ABC"), min_size=1, max_size=4).map("/".join)
stores = st.dictionaries(
    st.sampled_from(["s1", "s2", "s3"]), st.lists(paths, min_size=1, max_size=6, unique=True), min_size=1
)


def folders(held: dict[str, list[str]]) -> dict[str, list[ClassFolder]]:
    return {store: [class_folder(path) for path in held[store]] for store in held}


@given(stores, st.randoms())
def test_the_catalogue_does_not_depend_on_any_order(held, random) -> None:  # type: ignore[no-untyped-def]
    shuffled = {store: random.sample(held[store], len(held[store])) for store in random.sample(list(held), len(held))}
    assert Catalogue.resolve(folders(shuffled)) == Catalogue.resolve(folders(held))


@given(stores)
def test_no_two_folders_of_one_store_are_the_same_class(held) -> None:  # type: ignore[no-untyped-def]
    catalogue = Catalogue.resolve(folders(held))
    for paths in held.values():
        indices = [catalogue.index_of(class_folder(path)) for path in paths]
        assert None not in indices
        assert len(set(indices)) == len(paths)


@given(stores)
def test_every_class_has_a_name_that_its_paths_end_in_and_names_are_sorted(held) -> None:  # type: ignore[no-untyped-def]
    catalogue = Catalogue.resolve(folders(held))
    assert list(catalogue.names) == sorted(set(catalogue.names))
    for name, members in zip(catalogue.names, catalogue.members, strict=True):
        assert members
        assert all(f"/{path}".endswith(f"/{name}") for path in members)


@given(stores)
def test_without_a_clash_inside_a_store_the_leaf_is_the_name(held) -> None:  # type: ignore[no-untyped-def]
    clashing = {
        leaf for paths in held.values() for leaf in "ABC" if sum(path.split("/")[-1] == leaf for path in paths) > 1
    }
    plain = {path.split("/")[-1] for paths in held.values() for path in paths} - clashing
    names = Catalogue.resolve(folders(held)).names
    assert plain <= set(names)
    assert not any("/" in name for name in names if name.split("/")[-1] in plain)
