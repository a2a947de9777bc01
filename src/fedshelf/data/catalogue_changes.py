"""Changes of a run's catalogue: new products, which come after the others, and other names for products.

The rows of a model's head have the order of the catalogue, so no product is ever removed, renamed, or moved.
"""

import unicodedata
from collections.abc import Sequence

from fedshelf.core.class_folder import ClassFolder, problem_with
from fedshelf.core.errors import DataError
from fedshelf.core.text import counted, some
from fedshelf.data.catalogue import MAX_PRODUCTS, Catalogue
from fedshelf.data.class_names import similar_names


def with_products(catalogue: Catalogue, products: Sequence[str], *, allow_similar: bool = False) -> Catalogue:
    """A catalogue with new products after the known ones. Those that it has already are left out.

    Args:
        catalogue: the catalogue.
        products: their names: a folder's name, or a path suffix such as 'Apple/Red'.
        allow_similar: whether names may be equal to known ones but for case, blanks, accents, or plural.

    Raises:
        DataError: names cannot be used; all problems are listed.
    """
    names = tuple(unicodedata.normalize("NFC", product.strip()) for product in products)
    added = tuple(dict.fromkeys(name for name in names if name not in catalogue.names))
    problems = [problem for name in added if (problem := _problem_with(name, catalogue))]
    both = {*catalogue.names, *added}
    problems += [
        f"'{short}' is the end of the product '{long}': which of the two a folder called '{short}' holds would be "
        "unclear. Give both a path, such as 'Apple/Red'"
        for long in sorted(both)
        for short in (long.split("/", depth)[-1] for depth in range(1, long.count("/") + 1))
        if short in both and (short in added or long in added)
    ]
    if not allow_similar:
        problems += [
            f"{' and '.join(map(repr, group))} are equal but for case, blanks, accents, or plural. If they are one "
            "product, use 'fedshelf catalogue alias'; if not, --allow-similar"
            for group in similar_names(both)
            if {*group} & {*added}
        ]
    if len(both) > MAX_PRODUCTS:
        problems.append(f"the catalogue would have {counted(len(both), 'product')}; {MAX_PRODUCTS:,} is the most")
    if problems:
        raise DataError(*problems)
    members = (*catalogue.members, *((name,) for name in added))
    return Catalogue((*catalogue.names, *added), members)


def problem_with_change(before: Catalogue, after: Catalogue) -> str:
    """Why a run cannot go from one catalogue to another; empty if the change only adds products and names."""
    if after.names[: len(before)] != before.names:
        found = [old for old, new in zip(before.names, after.names, strict=False) if old != new]
        return f"products were removed, renamed, or moved ({some(found or before.names[len(after) :])})"
    lost = [
        name
        for name, old, new in zip(before.names, before.members, after.members, strict=False)
        if not {*old} <= {*new}
    ]
    return f"names of products were removed ({some(lost)})" if lost else ""


def _problem_with(name: str, catalogue: Catalogue) -> str:
    if not name:
        return "a product's name is empty"
    if not name.isprintable():
        return f"{name!r} holds control or invisible characters"
    if problem := problem_with([ClassFolder(leaf=name.rsplit("/", 1)[-1], path=name)]):
        return f"'{name:.100}' cannot be a product's name: {problem}"
    other = next((known for known, paths in zip(catalogue.names, catalogue.members, strict=True) if name in paths), "")
    return f"'{name}' is another name of the product '{other}' already" if other else ""
