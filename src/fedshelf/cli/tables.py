"""Tables that fit the terminal, without truncating names, ids or paths."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from fedshelf.core.text import printable
from fedshelf.reporting.formatting import ABSENT
from fedshelf.tracking.terminal import GLUE, wrapped

GAP = 2  # spaces between columns
INDENT = " " * 4
LEAST_FIRST = 12  # minimum width of the first column; longer names are on their own line


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column.

    Attributes:
        name: the heading.
        is_figure: align to the right.
        is_optional: omit if the terminal is too narrow for all columns.
    """

    name: str
    is_figure: bool = False
    is_optional: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A row.

    Attributes:
        cells: one text per column.
        notes: sentences shown below the row.
    """

    cells: Sequence[str]
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Columns and rows, laid out for a given width.

    Columns without any value are omitted. A first cell that is too long for its column is on a line of its own. If that
    is not enough, optional columns are omitted, and finally each row becomes a short list.

    Attributes:
        columns: the columns.
        rows: the rows.
    """

    columns: Sequence[Column]
    rows: list[Row] = field(default_factory=list)

    def add(self, *cells: str, notes: Sequence[str] = ()) -> None:
        """Append a row."""
        self.rows.append(Row(tuple(map(printable, cells)), tuple(map(printable, notes))))

    def transposed(self) -> "Table":
        """Swap rows and columns, for a few long rows that do not fit side by side."""
        names = [self.columns[0].name, *(row.cells[0] for row in self.rows)]
        turned = Table(columns=[Column(name=name) for name in names])
        for index, column in enumerate(self.columns[1:], start=1):
            turned.add(column.name, *(row.cells[index] for row in self.rows))
        return turned

    def fits(self, width: int) -> bool:
        """Whether all columns fit side by side, without a cell on a line of its own."""
        return self._width(self._shown()) <= width

    def print(self, console: Console) -> None:
        """Print the table at the console's width."""
        heading = self._layout(console.width) is not None
        for line in self.lines(console.width):
            console.print(
                Text(printable(line), style="bold" if heading else ""), crop=False, overflow="ignore", no_wrap=True
            )
            heading = False

    def lines(self, width: int) -> Iterator[str]:
        """Yield the table's lines, the heading first. Only a single long word can exceed `width`."""
        shown = self._layout(width)
        if shown is None:
            yield from self._as_lists(width)
            return
        first = width - sum(GAP + self._width_of(i) for i in shown[1:])
        widths = {i: self._width_of(i, most=first if i == shown[0] else None) for i in shown}
        yield self._line([column.name for column in self.columns], widths)
        for row in self.rows:
            cells = list(row.cells)
            if cell_len(cells[0]) > widths[0]:
                yield cells[0]
                cells[0] = ""
            yield self._line(cells, widths)
            for note in row.notes:
                yield from wrapped(note, width, INDENT)

    def _shown(self) -> list[int]:
        return [0, *(i for i in range(1, len(self.columns)) if any(r.cells[i] not in ("", ABSENT) for r in self.rows))]

    def _layout(self, width: int) -> list[int] | None:
        """Choose the columns that fit side by side; None if they do not fit.

        An optional column is omitted if it would move a first cell to its own line.
        """

        def num_names(columns: Sequence[int]) -> int:
            """Return how many first cells fit next to the other columns; -1 if the first column is too narrow."""
            left = width - sum(GAP + self._width_of(i) for i in columns[1:])
            return sum(cell_len(row.cells[0]) <= left for row in self.rows) if left >= least_first else -1

        shown = self._shown()
        least_first = max(cell_len(self.columns[0].name), min(LEAST_FIRST, self._width_of(0)))
        needed = [i for i in shown if not self.columns[i].is_optional]
        while num_names(shown) < num_names(needed):
            shown.remove(max(i for i in shown if self.columns[i].is_optional))
        return shown if num_names(shown) >= 0 else None

    def _width_of(self, index: int, most: int | None = None) -> int:
        """Return a column's width, ignoring cells wider than `most`."""
        widths = [cell_len(row.cells[index]) for row in self.rows]
        return max([cell_len(self.columns[index].name), *(w for w in widths if most is None or w <= most)])

    def _width(self, shown: Sequence[int]) -> int:
        return sum(GAP + self._width_of(i) for i in shown) - GAP

    def _line(self, cells: Sequence[str], widths: dict[int, int]) -> str:
        padded = (self._padded(cells[i], width, self.columns[i]) for i, width in widths.items())
        return (" " * GAP).join(padded).rstrip()

    def _padded(self, cell: str, width: int, column: Column) -> str:
        blanks = " " * (width - cell_len(cell))
        return blanks + cell if column.is_figure else cell + blanks

    def _as_lists(self, width: int) -> Iterator[str]:
        for row in self.rows:
            yield f"{self.columns[0].name} {row.cells[0]}" if self.columns[0].is_figure else row.cells[0]
            pairs = zip(self.columns[1:], row.cells[1:], strict=True)
            figures = [f"{column.name} {cell}" for column, cell in pairs if cell not in ("", ABSENT)]
            glued = (f.replace(" ", GLUE) if cell_len(INDENT + f) < width else f for f in figures)
            yield from wrapped(", ".join(glued), width, INDENT)
            for note in row.notes:
                yield from wrapped(note, width, INDENT)
