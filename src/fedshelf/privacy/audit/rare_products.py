"""Products that few stores sell: their rows of the output layer are those stores' rows, even in a sum over all stores.

A class without photos at a store still gets a gradient there, but only one that pushes its logit down: the row's
direction comes from the stores that sell the product. So who reads the sum reads, for a product of a single store, what
that store's photos look like to the model, and that it sells the product.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RareProduct:
    """A product that fewer stores sell than are wanted.

    Attributes:
        product: its name.
        stores: the stores, sorted.
    """

    product: str
    stores: tuple[str, ...]


def rare_products(products: Mapping[str, Iterable[str]], *, least: int) -> tuple[RareProduct, ...]:
    """Find the products that some stores sell, but fewer than `least`.

    Args:
        products: the products of each store.
        least: number of stores among which a store is to be hidden.

    Returns:
        The products, those of the fewest stores first.
    """
    sellers: dict[str, set[str]] = {}
    for store, names in products.items():
        for name in names:
            sellers.setdefault(name, set()).add(store)
    found = [
        RareProduct(product=name, stores=tuple(sorted(stores)))
        for name, stores in sellers.items()
        if len(stores) < least
    ]  # fmt: skip
    return tuple(sorted(found, key=lambda rare: (len(rare.stores), rare.product)))
