"""Checks of class names: products with two names, and folders of stores mistaken for classes."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from fedshelf.core.class_folder import ClassFolder
from fedshelf.core.text import counted, some
from fedshelf.data.catalogue import Catalogue

MOST = 20  # groups of similar names, and names of one group, in a message
ALIKE = "equal but for case, blanks, accents or plural, and taken as different products"
_STORE_NAME = re.compile(
    r"(store|shop|branch|site|client|filiale|markt|magasin|tienda|negozio|门店|商店)[ _-]*\d+", re.IGNORECASE
)


def federation_doubts(joins: Mapping[str, Sequence[ClassFolder]], catalogue: Catalogue) -> list[str]:
    """Find suspicious classes across all stores, before the catalogue is frozen for the run.

    Args:
        joins: by client, the classes that it holds.
        catalogue: the resolved catalogue.

    Returns:
        One sentence for each finding.
    """
    holders: dict[str, list[str]] = {name: [] for name in catalogue.names}
    found = []
    for client, folders in sorted(joins.items()):
        for index in {catalogue.index_of(folder) for folder in folders} - {None}:
            holders[catalogue.names[index or 0]].append(client)
        stores, _ = nested_stores(sorted({folder.path for folder in folders}))
        if stores:
            found.append(f"store '{client}' looks like a folder of stores: {stores}")
    groups = similar_names(catalogue.names)
    alike = [" and ".join(f"'{name}' (in {some(holders[name])})" for name in group[:MOST]) for group in groups[:MOST]]
    if alike:
        more = f"; and {counted(len(groups) - MOST, 'more group')}" if len(groups) > MOST else ""
        found.append(f"class names {ALIKE}: {'; '.join(alike)}{more}. To unite them, list them in a file for --aliases")
    if len(joins) > 1 and all(len(clients) < 2 for clients in holders.values()):
        found.append(
            f"no two stores have a product in common ({some(sorted(joins))}): do these folders hold stores, "
            "or groups of one store's products?"
        )
    return found


def similar_names(names: Iterable[str]) -> list[list[str]]:
    """Groups of names that differ only in case, blanks, hyphens, accents, invisible characters or plural."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in sorted(set(names)):
        groups[tuple(_key(part) for part in name.split("/"))].append(name)
    return [group for group in groups.values() if len(group) > 1]


def nested_stores(paths: Sequence[str]) -> tuple[str, bool]:
    """Find top-level folders of `paths` that look like stores.

    Returns:
        A description of the folders (empty if there are none), and whether they are certainly stores.
    """
    parts = [tuple(path.split("/")) for path in paths]
    while len(parts) > 1 and all(len(path) > 1 and path[0] == parts[0][0] for path in parts):
        parts = [path[1:] for path in parts]
    tops: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for path in parts:
        tops[path[0] if len(path) > 1 else ""].add(path[1:] or path)
    direct = tops.pop("", set())
    times = Counter(product for products in (*tops.values(), direct) for product in products)
    alike = [top for top, products in tops.items() if 2 * sum(times[p] > 1 for p in products) >= len(products)]
    named = [top for top in alike if _STORE_NAME.fullmatch(top)]
    if not named and (direct or len(alike) < 2 or 2 * len(alike) < len(tops)):
        return "", False
    shared = sorted("/".join(product) for product in times if times[product] > 1)
    certain = bool(named) or all("train" in {product[0] for product in tops[top]} for top in alike)
    return f"products such as {some(shared[:2])} lie in several of its folders, among them {some(alike)}", certain


def _key(name: str) -> str:
    """A key that is equal for names that differ only in case, blanks, accents or plural."""
    letters = unicodedata.normalize("NFKD", name).casefold()
    kept = "".join(c for c in letters if not "\u0300" <= c <= "\u036f" and unicodedata.category(c) != "Cf")
    return "".join(map(_singular, re.findall(r"[^\s_-]+", kept)))


def _singular(word: str) -> str:
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    return re.sub(r"((?<=[xzo])|(?<=ch|sh|ss))e$", "", re.sub(r"(ie|y)$", "i", word))
