"""The products that a model distinguishes, and the folders of the stores that hold their photos.

Clients hold different subsets of the classes, with different nesting. The server resolves the folder names of all
clients together: the same leaf name is the same product, unless one store has two folders of that name.
"""

import csv
import hashlib
import io
import json
import statistics
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from fedshelf.core.class_folder import ClassFolder
from fedshelf.core.errors import DataError
from fedshelf.core.text import counted
from fedshelf.data.filesystem import reading
from fedshelf.data.product_tree import ProductTree
from fedshelf.storage.atomic_files import write_atomically

MAX_PRODUCTS = 20_000  # in a catalogue that nobody has confirmed
FEW_PRODUCTS, MANY_TIMES = 100, 10  # what one store may bring alone; see `Catalogue.unusual`
_FORMAT = 1
_HEADER_WORDS = frozenset({"class", "classes", "class name", "class name (str)", "name", "label", "product"})


@dataclass(frozen=True)
class Catalogue:
    """Class names by index, with the class paths of each.

    Attributes:
        names: unique; the model's output i is `names[i]`.
        members: by name, the '/'-separated class paths of all stores that hold it, sorted.
    """

    names: tuple[str, ...]
    members: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        problems = [f"class name '{name}' is there twice" for name in _repeated(self.names)]
        problems += [
            f"class path '{path}' belongs to two classes"
            for path in _repeated(path for paths in self.members for path in set(paths))
        ]
        if len(self.names) != len(self.members):
            problems.append(f"{len(self.names)} names but {len(self.members)} lists of members")
        if not self.names or not all(self.names):
            problems.append("there is no class" if not self.names else "a class name is empty")
        if problems:
            raise DataError(f"catalogue: {'; '.join(problems)}")

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def resolve(
        cls, joins: Mapping[str, Sequence[ClassFolder]], aliases: Mapping[str, str] = MappingProxyType({})
    ) -> "Catalogue":
        """Name the classes of all clients, sorted; the result does not depend on any order.

        Folders with the same leaf name are one product of that name, even if stores nest them differently. If any store
        has two different folders with that leaf name, these classes are distinguished in all stores by the shortest
        sufficient path suffix: 'Apple/Red', 'Pear/Red'.

        Args:
            joins: by client, the classes that it holds.
            aliases: by alias, the class that it means; see `load_aliases`. Takes precedence over all other rules.

        Raises:
            DataError: no client holds any class, or a path is empty.
        """
        stores = list(
            {frozenset(folder.path for folder in folders) for folders in joins.values()}
        )  # many stores have the same folders
        by_leaf: dict[str, set[str]] = defaultdict(set)
        classes: dict[str, frozenset[str]] = {}
        meant = {**aliases, **{name: name for name in aliases.values()}}
        for path in frozenset().union(*stores):
            united = next((meant[suffix] for suffix in _suffixes(path) if suffix in meant), None)
            if united is None:
                by_leaf[_suffix(path, 1)].add(path)
            else:
                classes[united] = classes.get(united, frozenset()) | {path, *(a for a in aliases if meant[a] == united)}
        for paths in by_leaf.values():
            classes |= _split_by_suffix(frozenset(paths), stores)
        names = tuple(sorted(classes))
        return cls(names, tuple(tuple(sorted(classes[name])) for name in names))

    def unusual(self, joins: Mapping[str, Sequence[ClassFolder]]) -> str:
        """Why a person should look at this catalogue before a model of its size is built; empty if it is as expected.

        It is unusual if it is very large, or if one store alone brings more products than `FEW_PRODUCTS` and
        `MANY_TIMES` the products of its median peer: a broken or hostile store, or a wrong folder.

        Args:
            joins: by client, the classes that it holds.
        """
        size = counted(len(self), "product")
        held = {
            name: {self._by_path[folder.path] for folder in folders if folder.path in self._by_path}
            for name, folders in joins.items()
        }
        holders = Counter(index for indices in held.values() for index in indices)
        for name, indices in sorted(held.items()):
            others = [len(other) for peer, other in held.items() if peer != name]
            usual = statistics.median(others) if others else len(indices)
            alone = sum(holders[index] == 1 for index in indices)
            if alone > max(FEW_PRODUCTS, MANY_TIMES * usual):
                return (
                    f"'{name}' alone brings {alone:,} of its {size}, more than {MANY_TIMES} times the "
                    f"{usual:,g} of the median other store"
                )
        return f"it has {size}, more than {MAX_PRODUCTS:,}" if len(self) > MAX_PRODUCTS else ""

    def index_of(self, folder: ClassFolder) -> int | None:
        """The class of photos in `folder`; None if it is not in the catalogue.

        A path that no store had when the catalogue was made is matched by its longest suffix that is a class name or a
        known path; None if longer class names end in that suffix too, because the class is then ambiguous.
        """
        known = self._by_path.get(folder.path)
        if known is not None:
            return known
        for suffix in _suffixes(folder.path):
            index = self._by_name.get(suffix, self._by_path.get(suffix))
            if index is not None:
                return None if suffix in self._proper_suffixes else index
        return None

    def first(self, number: int) -> "Catalogue":
        """The catalogue of the first classes."""
        return Catalogue(self.names[:number], self.members[:number])

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the JSON text. Two sides with the same digest agree on every index."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def names_digest(self) -> str:
        """SHA-256 (hex) of the names in order: the meaning of the rows of a model's head."""
        return hashlib.sha256(json.dumps(self.names).encode()).hexdigest()

    def num_first(self, names_digest: str) -> int | None:
        """How many of the first names have the digest `names_digest`; None if no beginning of the names has it."""
        text = hashlib.sha256(b"[")
        for index, name in enumerate(self.names):
            text.update((", " * bool(index) + json.dumps(name)).encode())
            whole = text.copy()
            whole.update(b"]")
            if whole.hexdigest() == names_digest:
                return index + 1
        return None

    def to_json(self) -> str:
        """The catalogue as text; equal catalogues give equal text."""
        classes = [{"name": name, "members": list(paths)} for name, paths in zip(self.names, self.members, strict=True)]
        return json.dumps({"format": _FORMAT, "classes": classes}, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Catalogue":
        """Parse the output of `to_json`.

        Raises:
            DataError: the text is something else.
        """
        try:
            content = json.loads(text)
            if content["format"] != _FORMAT:
                raise DataError(f"catalogue of format {content['format']}: this version reads format {_FORMAT}")
            names = tuple(_text(entry["name"]) for entry in content["classes"])
            members = tuple(tuple(_text(path) for path in entry["members"]) for entry in content["classes"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"this is not a catalogue's JSON text: {type(error).__name__}: {error}") from error
        return cls(names, members)

    @classmethod
    def load(cls, path: Path) -> "Catalogue":
        """Read a catalogue file: the output of `save`, a CSV table, or plain text with one class name per line.

        In plain text, each line is a name; empty lines and lines that start with '#' are skipped. A CSV table has a
        name that ends in '.csv' and a header; names are in the column `class`, `name`, `label` or `product`, otherwise
        in the first. A name may be a path suffix ('Apple/Red') if the leaf alone is ambiguous.

        Raises:
            DataError: the file cannot be read, is empty or names a class twice.
        """
        text = _read_text(path, "catalogue file")
        try:
            if text.lstrip().startswith("{"):
                return cls.from_json(text)
            names = _names_of_table(text) if path.suffix.lower() == ".csv" else _lines(text)
            return cls(tuple(names), tuple((name,) for name in names))
        except DataError as error:
            is_saved = text.lstrip().startswith("{")
            advice = "Restore it from a copy" if is_saved else "Give one class name per line, each once"
            raise DataError(f"catalogue file '{path}' cannot be used: {error}. {advice}") from error

    def with_aliases(self, aliases: Mapping[str, str]) -> "Catalogue":
        """A copy of the catalogue with other names for its classes.

        Raises:
            DataError: an alias means a class that is not in the catalogue, or is itself a class in it, or another name
                of another class. All problems are listed.
        """
        problems = []
        if unknown := sorted(set(aliases.values()) - set(self.names)):
            problems.append(f"aliases for classes that the catalogue does not have: {', '.join(unknown)}")
        for alias, name in sorted(aliases.items()):
            known = self._by_name.get(alias, self._by_path.get(alias))
            if alias in self._by_name:
                problems.append(f"'{alias}' cannot be an alias of '{name}': it is a class of the catalogue itself")
            elif known is not None and self.names[known] != name:
                problems.append(f"'{alias}' cannot be an alias of '{name}': it is one of '{self.names[known]}'")
        if problems:
            raise DataError(*problems)
        others = {name: {alias for alias in aliases if aliases[alias] == name} for name in self.names}
        members = (sorted({*paths, *others[name]}) for name, paths in zip(self.names, self.members, strict=True))
        return Catalogue(self.names, tuple(map(tuple, members)))

    def save(self, path: Path) -> None:
        """Write the JSON text atomically.

        Raises:
            RunError: the file cannot be written.
        """
        write_atomically(path, self.to_json())

    @cached_property
    def tree(self) -> ProductTree:
        """The folders above the classes."""
        return ProductTree.of(self.names, self.members)

    @cached_property
    def _by_name(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    @cached_property
    def _by_path(self) -> dict[str, int]:
        return {path: index for index, paths in enumerate(self.members) for path in paths}

    @cached_property
    def _proper_suffixes(self) -> frozenset[str]:
        return frozenset(_suffix(name, depth) for name in self.names for depth in range(1, name.count("/") + 1))


def load_aliases(path: Path) -> dict[str, str]:
    """Read names that mean the same class from a CSV table with the columns `alias` and `class`.

    Returns:
        The class by alias. Both are class names: a folder name, or a path suffix such as 'Apple/Red'.

    Raises:
        DataError: the file cannot be read, lacks a column, or gives an alias two meanings. All problems with its lines
            are listed.
    """
    rows = _rows(_read_text(path, "alias file"))
    if not rows or not {"alias", "class"} <= rows[0].keys():
        raise DataError(f"alias file '{path}': its first line must be alias,class")
    pairs = [tuple(unicodedata.normalize("NFC", row[column]) for column in ("alias", "class")) for row in rows]
    try:
        return united(pairs)
    except DataError as error:
        raise DataError(*(f"alias file '{path}': {problem}" for problem in error.args)) from None


def united(pairs: Iterable[Sequence[str]]) -> dict[str, str]:
    """The class by alias, of pairs of an alias and a class.

    Raises:
        DataError: a pair is incomplete, an alias has two meanings, or has an alias itself. All problems are listed.
    """
    aliases: dict[str, str] = {}
    problems = []
    for alias, name in pairs:
        if not alias or not name:
            problems.append(f"a line has no {'class' if alias else 'alias'}: {alias}{name}")
        elif aliases.setdefault(alias, name) != name:
            problems.append(f"'{alias}' means both '{aliases[alias]}' and '{name}'")
    if chained := sorted(set(aliases) & set(aliases.values())):
        problems.append(f"{', '.join(chained)} both has an alias and is one")
    if problems:
        raise DataError(*problems)
    return aliases


def _read_text(path: Path, what: str) -> str:
    with reading(f"{what} '{path}'"):
        return path.read_text(encoding="utf-8-sig")


def _rows(text: str) -> list[dict[str, str]]:
    """The rows of a CSV table by lower-case column name. Leading blanks of values are ignored."""
    try:
        header, *rows = [row for row in csv.reader(io.StringIO(text), skipinitialspace=True) if any(row)] or [[]]
    except csv.Error as error:
        raise DataError(f"it is not a CSV table ({error})") from error
    columns = [_clean(column).lower() for column in header]
    return [dict(zip(columns, row + [""] * len(columns), strict=False)) for row in rows]


def _names_of_table(text: str) -> list[str]:
    rows = _rows("\n".join(line for line in text.splitlines() if not line.startswith("#")))
    columns = list(rows[0]) if rows else []
    if not _HEADER_WORDS.intersection(columns):
        raise DataError("its first line does not name the columns, such as: class")
    column = next(column for column in columns if column in _HEADER_WORDS)
    return [_clean(row[column]) for row in rows if row[column].strip()]


def _lines(text: str) -> list[str]:
    if "-----BEGIN " in text:
        raise DataError("it holds a key or a certificate")
    return [_clean(line) for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _clean(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip())


def _split_by_suffix(paths: frozenset[str], stores: Sequence[frozenset[str]]) -> dict[str, frozenset[str]]:
    """Split `paths`, which share their last part, by longer and longer suffixes until no store has two in one group."""
    result: dict[str, frozenset[str]] = {}
    pending = [(1, paths)]
    while pending:
        depth, group = pending.pop()
        if len(group) == 1 or all(len(group & store) <= 1 for store in stores):
            result[_suffix(next(iter(group)), depth)] = group
            continue
        longer: dict[str, set[str]] = defaultdict(set)
        for path in group:
            longer[_suffix(path, depth + 1)].add(path)
        pending += [(depth + 1, frozenset(parts)) for parts in longer.values()]
    return result


def _suffix(path: str, depth: int) -> str:
    """The last `depth` parts of a '/'-separated path, or the whole path if it has fewer."""
    return "/".join(path.split("/")[-depth:])


def _suffixes(path: str) -> Iterator[str]:
    """All suffixes of a path, longest first."""
    return (_suffix(path, depth) for depth in range(path.count("/") + 1, 0, -1))


def _repeated(values: Iterable[str]) -> list[str]:
    seen: set[str] = set()
    repeated: set[str] = set()
    for value in values:
        (repeated if value in seen else seen).add(value)
    return sorted(repeated)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    value.encode()  # JSON can escape half a surrogate pair, which can be neither sent nor stored
    return value
