"""Progress output of long-running commands, and how they are stopped."""

import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fedshelf.cli.tables import Table
from fedshelf.core.text import printable
from fedshelf.tracking.terminal import continued, make_console, print_line

if TYPE_CHECKING:
    from fedshelf.core.ports import MetricSink


def echo(*parts: str | Table) -> None:
    """Print text and tables to standard output, with a blank line around each table."""
    console = make_console()
    shown = [part for part in parts if isinstance(part, str) or part.rows]
    for before, part in zip([None, *shown], shown, strict=False):
        if before is not None and not (isinstance(before, str) and isinstance(part, str)):
            print_line(console, "")
        print_line(console, part) if isinstance(part, str) else part.print(console)


def print_json(value: object, *, indent: int | None = None) -> None:
    """Print plain values as JSON in ASCII, so that no text in it controls a terminal; NaN and infinity become null.

    Args:
        value: the value.
        indent: indentation; None prints one line.
    """
    from fedshelf.serialization.records import dump

    print(dump(value, indent=indent, ascii=True), flush=True)


def program() -> str:
    """How to start `fedshelf` in the user's shell: by its name, or by its path if that is not on PATH."""
    if shutil.which("fedshelf") is not None:
        return "fedshelf"
    script = Path(sys.executable).with_name("fedshelf")
    if not script.exists():
        return f"{shlex.quote(sys.executable)} -m fedshelf"
    with suppress(ValueError):
        script = script.relative_to(Path.cwd())
    return shlex.quote(str(script))


def echo_command(*commands: str) -> None:
    """Print the next commands to run, ready to paste. Each begins with `fedshelf`."""
    console = make_console()
    print_line(console, "Next:")
    for command in commands:
        started = program() + command.removeprefix("fedshelf")
        for line in continued(printable(started), console.width, "  "):
            console.print(line, soft_wrap=True)


@contextmanager
def progress_bar(what: str, *, is_bytes: bool = False) -> Iterator[Callable[[int, int | None], None]]:
    """Show a progress bar on standard error, if that is a terminal. A context manager.

    Ctrl-C raises KeyboardInterrupt within it, so that the work can be cleaned up.

    Args:
        what: the label, such as `Checking photos`.
        is_bytes: format the counts as bytes.

    Yields:
        A function to call with the number done and the total.
    """
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = make_console(stderr=True)
    columns = (
        TextColumn(what), BarColumn(bar_width=24), DownloadColumn() if is_bytes else MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
    )  # fmt: skip
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if not console.is_interactive:  # some versions of Rich write an empty line even for a disabled bar
            yield lambda done, total: None
            return
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def watching(*, as_json: bool) -> Iterator["MetricSink"]:
    """Yield a sink that shows events: a live display, or one JSON object per line."""
    from fedshelf.tracking.console import ConsoleSink
    from fedshelf.tracking.sinks import JsonLinesSink

    if as_json:
        yield JsonLinesSink(sys.stdout)
        return
    console = ConsoleSink(make_console())
    try:
        yield console
    finally:
        console.close()
