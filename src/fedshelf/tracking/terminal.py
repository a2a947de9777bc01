"""Where text for a person goes, and how wide it is.

On a terminal, lines break between words and colors are used (not with `NO_COLOR` or `TERM=dumb`). Anywhere else (a
pipe, a file, the journal of a service) there are no colors and no cursor movements, and one line stays one line.
Nothing in the text is taken for markup, and nothing in it can move the cursor.
"""

import logging
import os
import re
import sys
from collections.abc import Iterator

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from fedshelf.core.text import printable

GLUE = "\ue000"  # a blank at which no line breaks
UNLIMITED = 10_000  # columns of what is no terminal
_LEVELS = {logging.WARNING: ("warning: ", "yellow"), logging.ERROR: ("error: ", "bold red")}


def make_console(*, stderr: bool = False) -> Console:
    """A console on one of the standard streams. The width is `COLUMNS`, else the terminal's; a pipe has none.

    Args:
        stderr: standard error instead of standard output.

    Returns:
        A console that prints text as it is, without markup.
    """
    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    columns = os.environ.get("COLUMNS", "")
    width = (int(columns) if columns.isdecimal() else 0) or (None if is_terminal else UNLIMITED)
    return Console(
        stderr=stderr,
        force_terminal=is_terminal,
        color_system="auto" if is_terminal and not os.environ.get("NO_COLOR") else None,
        width=width,
        height=width and 25,  # without a height, rich takes a dumb terminal for 80 columns wide
        markup=False,
        emoji=False,
        highlight=False,
    )


def print_line(console: Console, line: str, *, label: str = "", style: str = "", label_style: str = "") -> None:
    """Print one line of text. On a terminal it breaks between words; a word that is too long (a path, a flag) stands
    whole on a line of its own.

    Args:
        console: where to.
        line: the text; control characters in it are shown, not sent.
        label: what stands before it, such as `warning: `.
        style: how the text looks.
        label_style: how the label looks.
    """
    text = label + printable(line)
    for part in wrapped(text, console.width) if console.is_terminal else [text]:
        console.print(
            Text.assemble((part[: len(label)], label_style or style), (part[len(label) :], style)), soft_wrap=True
        )
        label = ""


def wrapped(text: str, width: int, indent: str = "") -> Iterator[str]:
    """`text` in lines of at most `width` cells, broken at blanks only; a longer word stands on a line of its own."""
    line = ""
    for word in re.findall(" *[^ ]+", text):  # with the blanks before it
        if line and cell_len(line + word) > width:
            yield line.replace(GLUE, " ")
            line = indent + word.lstrip(" ")
        else:
            line += word if line else indent + word
    yield line.replace(GLUE, " ")


def continued(command: str, width: int, indent: str = "") -> Iterator[str]:
    """A command in lines of at most `width` cells that can be pasted: all but the last end with a backslash."""
    line, begin = indent + command, len(indent) + 4
    while cell_len(line) > width and " " in line[begin : width - 1]:
        end = max(line.rfind(" --", begin, width - 1), 0) or line.rindex(" ", begin, width - 1)
        yield f"{line[:end]} \\"
        line = " " * begin + line[end + 1 :]
    yield line


class LogHandler(logging.Handler):
    """Log records as lines on standard error. They have no time of their own: a service's journal adds it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record, its traceback (if any) line by line."""
        label, style = _LEVELS.get(min(record.levelno, logging.ERROR), ("", ""))
        try:
            console = make_console(stderr=True)
            for line in self.format(record).splitlines():
                print_line(console, line, label=label, label_style=style)
                label = ""
        except Exception:  # noqa: BLE001  as logging's own handlers: a message must not end what it is about
            self.handleError(record)
