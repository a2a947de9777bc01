"""What a how-to page adds to FedShelf: a file, and a line in a registry."""

import re
from dataclasses import dataclass
from pathlib import Path

PAGES = Path(__file__).parents[1] / "docs" / "how-to"


@dataclass(frozen=True, kw_only=True)
class Addition:
    """The code of a page.

    Attributes:
        path: of the new file.
        source: what is in it.
        registry: the file in which the line goes.
        table: the name of the dictionary there.
        line: the line.
    """

    path: str
    source: str
    registry: str
    table: str
    line: str

    @classmethod
    def of(cls, page: str) -> "Addition":
        """What the page of that name adds."""
        text = (PAGES / page).read_text(encoding="utf-8")
        source, line = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        path = re.search(r"^`(src/\S+)` opens", text, re.MULTILINE)
        place = re.search(r"^In `(src/\S+)`, among the `(\w+)`:", text, re.MULTILINE)
        assert path is not None
        assert place is not None
        return cls(path=path[1], source=source, registry=place[1], table=place[2], line=line)

    @property
    def entry(self) -> tuple[str, str]:
        """The name that is registered, and the component it stands for."""
        found = re.fullmatch(r'\s*"(\w+)": "([\w.:]+)",\s*', self.line)
        assert found is not None
        return found[1], found[2]

    def add_to(self, root: Path) -> None:
        """Do what the page says, in a copy of the project."""
        (root / self.path).write_text(self.source, encoding="utf-8")
        registry = root / self.registry
        before = registry.read_text(encoding="utf-8")
        after = re.sub(rf"^({self.table}\b.*\{{\n)", lambda m: m[1] + self.line, before, flags=re.MULTILINE)
        assert after.count("\n") == before.count("\n") + 1
        registry.write_text(after, encoding="utf-8")
