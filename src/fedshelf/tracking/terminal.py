"""Text output for the user, and its width.

On a terminal, lines wrap between words and colors are used (unless `NO_COLOR` or `TERM=dumb` is set). Elsewhere (a
pipe, a file, a service's journal) there are no colors or cursor movements, and lines are not wrapped. Text is never
interpreted as markup, and control characters in it are escaped.
"""

import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from fedshelf.core.text import printable

GLUE = "\ue000"  # a non-breaking space
UNLIMITED = 10_000  # columns where the output is not a terminal
_LEVELS = {logging.WARNING: ("warning: ", "yellow"), logging.ERROR: ("error: ", "bold red")}


def make_console(*, stderr: bool = False) -> Console:
    """Create a console whose width is `COLUMNS`, or else the terminal's; unlimited for a pipe.

    Args:
        stderr: use standard error instead of standard output.

    Returns:
        A console that prints text without interpreting markup.
    """
    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    columns = os.environ.get("COLUMNS", "")
    width = (int(columns) if columns.isdecimal() else 0) or (None if is_terminal else UNLIMITED)
    return Console(
        stderr=stderr,
        force_terminal=is_terminal,
        force_jupyter=False,  # a notebook gets lines of text, as a pipe
        color_system="auto" if is_terminal and not os.environ.get("NO_COLOR") else None,
        width=width,
        height=width and 25,  # without a height, rich assumes 80 columns for a dumb terminal
        markup=False,
        emoji=False,
        highlight=False,
    )


def print_line(console: Console, line: str, *, label: str = "", style: str = "", label_style: str = "") -> None:
    """Print one line of text. On a terminal it wraps between words; a longer word (a path, a flag) is on its own line.

    Args:
        console: the output.
        line: the text; control characters are escaped.
        label: a prefix, such as `warning: `.
        style: the text's style.
        label_style: the label's style.
    """
    text = label + printable(line)
    for part in wrapped(text, console.width) if console.is_terminal else [text]:
        console.print(
            Text.assemble((part[: len(label)], label_style or style), (part[len(label) :], style)), soft_wrap=True
        )
        label = ""


def wrapped(text: str, width: int, indent: str = "") -> Iterator[str]:
    """Wrap `text` at spaces into lines of at most `width` cells; a longer word is on its own line, with less indent."""
    line = ""
    for word in re.findall(" *[^ ]+", text):  # with its leading spaces
        if line and cell_len(line + word) > width:
            yield line.replace(GLUE, " ")
            line = word.lstrip(" ")
            line = indent[: max(0, width - cell_len(line))] + line
        else:
            line += word if line else indent + word
    yield line.replace(GLUE, " ")


def continued(command: str, width: int, indent: str = "") -> Iterator[str]:
    """Wrap a command into lines of at most `width` cells that can be pasted: all but the last end with a backslash."""
    line, begin = indent + command, len(indent) + 4
    while cell_len(line) > width and " " in line[begin : width - 1]:
        end = max(line.rfind(" --", begin, width - 1), 0) or line.rindex(" ", begin, width - 1)
        yield f"{line[:end]} \\"
        line = " " * begin + line[end + 1 :]
    yield line


class LogHandler(logging.Handler):
    """Writes log records to standard error, without a time stamp: a service's journal adds one.

    A message is one line, whatever is in it. Its traceback follows, indented: no text in a record can look like another
    record.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record and its traceback, if any, line by line."""
        label, style = _LEVELS.get(min(record.levelno, logging.ERROR), ("", ""))
        try:
            console = make_console(stderr=True)
            print_line(console, record.getMessage().rstrip("\r\n"), label=label, label_style=style)
            trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
            for line in "\n".join((trace, record.stack_info or "")).splitlines():
                if line:
                    print_line(console, f"  {line}")
        except Exception:  # noqa: BLE001  as in logging's own handlers: a failing log message must not stop the program
            self.handleError(record)


def log_to_stderr(level: int) -> None:
    """Send log records to standard error by `LogHandler`, unless the root logger has a handler.

    Args:
        level: the lowest level to show.
    """
    logging.basicConfig(level=level, handlers=[LogHandler()])


def show_uncaught_exceptions() -> None:
    """Print exceptions that no code of this process catches, in any thread, by `LogHandler` instead of as they are."""
    sys.excepthook = lambda kind, error, trace: _show("unexpected error", (kind, error, trace))
    threading.excepthook = lambda args: _show(
        f"unexpected error in thread {args.thread and args.thread.name}",
        (args.exc_type, args.exc_value, args.exc_traceback),
    )


def _show(what: str, info: tuple[Any, Any, Any]) -> None:
    LogHandler().emit(logging.makeLogRecord({"msg": what, "levelno": logging.ERROR, "exc_info": info}))
