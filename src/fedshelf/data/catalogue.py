"""The products a model tells apart, and which folders of which stores hold photos of each.

Clients hold different subsets of the classes, nested as each store likes. The server resolves the folder names of all
clients at once: the same leaf name is the same product, unless one store itself has two folders of that name.
"""

import csv
import hashlib
import io
import json
import os
import tempfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedshelf.core.errors import DataError
from fedshelf.core.messages import ClassFolder

_FORMAT = 1
_HEADER_WORDS = frozenset({"class", "classes", "class name", "class name (str)", "name", "label", "product"})


@dataclass(frozen=True)
class Catalogue:
    """Class names by index, and for each the class paths that mean it.

    Attributes:
        names: unique; the model's output i is `names[i]`.
        members: per name the '/'-separated class paths of all stores that hold it, sorted.
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
    def resolve(cls, joins: Mapping[str, Sequence[ClassFolder]]) -> "Catalogue":
        """Name the classes of all clients, sorted; the result does not depend on any order.

        Folders with the same leaf name are one product named by it, even where stores nest them differently. If any
        one store has two different folders of that leaf name, these classes are told apart, in all stores, by the
        shortest path suffix that does so: 'Apple/Red', 'Pear/Red'.

        Args:
            joins: the classes each client holds, by the client's name.

        Raises:
            DataError: no client holds any class, or a path is empty.
        """
        stores = list({frozenset(folder.path for folder in folders) for folders in joins.values()})  # many are alike
        by_leaf: dict[str, set[str]] = defaultdict(set)
        for path in frozenset().union(*stores):
            by_leaf[_suffix(path, 1)].add(path)
        classes: dict[str, frozenset[str]] = {}
        for paths in by_leaf.values():
            classes |= _tell_apart(frozenset(paths), stores, depth=1)
        names = tuple(sorted(classes))
        return cls(names, tuple(tuple(sorted(classes[name])) for name in names))

    def index_of(self, folder: ClassFolder) -> int | None:
        """The class that photos in `folder` show, or None if the catalogue does not say.

        A path that no store had when the catalogue was made is matched by the longest suffix that is a class name;
        None if longer class names end in that suffix too: then it cannot be known which one is meant.
        """
        known = self._by_path.get(folder.path)
        if known is not None:
            return known
        for depth in range(folder.path.count("/") + 1, 0, -1):
            suffix = _suffix(folder.path, depth)
            if suffix in self._by_name:
                return None if suffix in self._proper_suffixes else self._by_name[suffix]
        return None

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the JSON text; two sides with the same digest agree on every index."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def names_digest(self) -> str:
        """SHA-256 (hex) of the names in order: what the rows of a model's head mean."""
        return hashlib.sha256(json.dumps(self.names).encode()).hexdigest()

    def to_json(self) -> str:
        """The catalogue as text; equal catalogues give equal text."""
        classes = [{"name": name, "members": list(paths)} for name, paths in zip(self.names, self.members, strict=True)]
        return json.dumps({"format": _FORMAT, "classes": classes}, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Catalogue":
        """Read what `to_json` wrote.

        Raises:
            DataError: it is not such a text.
        """
        try:
            content = json.loads(text)
            if content["format"] != _FORMAT:
                raise DataError(f"catalogue of format {content['format']}: this version reads format {_FORMAT}")
            names = tuple(_text(entry["name"]) for entry in content["classes"])
            members = tuple(tuple(_text(path) for path in entry["members"]) for entry in content["classes"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"this is not a catalogue's JSON text: {type(error).__name__}: {error}") from error
        return cls(names, members)

    @classmethod
    def load(cls, path: Path) -> "Catalogue":
        """Read a catalogue file: what `save` wrote, or plain text or CSV with one class name per line.

        Of a CSV the first column counts; a header line, empty lines and lines that start with '#' are skipped. A
        name may be a path suffix ('Apple/Red') where the leaf alone would not tell classes apart.

        Raises:
            DataError: the file cannot be read, is empty or names a class twice.
        """
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"catalogue file '{path}' cannot be read: {error}") from error
        try:
            return cls.from_json(text) if text.lstrip().startswith("{") else cls._from_lines(text)
        except DataError as error:
            raise DataError(
                f"catalogue file '{path}' cannot be used: {error}. Give one class name per line, each once"
            ) from error

    def save(self, path: Path) -> None:
        """Write the JSON text; a crash leaves the old file or the new one."""
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def _from_lines(cls, text: str) -> "Catalogue":
        cells = [row[0].strip() for row in csv.reader(io.StringIO(text)) if row]
        names = [unicodedata.normalize("NFC", cell) for cell in cells if cell and not cell.startswith("#")]
        if names and names[0].lower() in _HEADER_WORDS:
            del names[0]
        return cls(tuple(names), tuple((name,) for name in names))

    @cached_property
    def _by_name(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    @cached_property
    def _by_path(self) -> dict[str, int]:
        return {path: index for index, paths in enumerate(self.members) for path in paths}

    @cached_property
    def _proper_suffixes(self) -> frozenset[str]:
        return frozenset(_suffix(name, depth) for name in self.names for depth in range(1, name.count("/") + 1))


def _tell_apart(paths: frozenset[str], stores: Sequence[frozenset[str]], *, depth: int) -> dict[str, frozenset[str]]:
    """Split `paths`, which share their last `depth` parts, until no store has two of one group."""
    if all(len(paths & store) <= 1 for store in stores):
        return {_suffix(next(iter(paths)), depth): paths}
    groups: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        groups[_suffix(path, depth + 1)].add(path)
    result: dict[str, frozenset[str]] = {}
    for group in groups.values():
        result |= _tell_apart(frozenset(group), stores, depth=depth + 1)
    return result


def _suffix(path: str, depth: int) -> str:
    """The last `depth` parts of a '/'-separated path; all of it where it has fewer."""
    return "/".join(path.split("/")[-depth:])


def _repeated(values: Iterable[str]) -> list[str]:
    seen: set[str] = set()
    repeated: set[str] = set()
    for value in values:
        (repeated if value in seen else seen).add(value)
    return sorted(repeated)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value
