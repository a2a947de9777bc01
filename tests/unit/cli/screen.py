"""A terminal for commands that run in this process, and how wide text is on it."""

import io
import os
import pty
import re
import threading
import unicodedata
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from fedshelf.cli.app import main

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b.")


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and all output of a command whose output is a pipe."""
    with io.TextIOWrapper(io.BytesIO(), encoding="utf-8") as stream:
        code = _run(stream, arguments)
        stream.flush()
        return code, stream.buffer.getvalue().decode()


def run_on_terminal(*arguments: str) -> tuple[int, str]:
    """The same, its output a terminal: as it arrives there, escape sequences and all."""
    master, slave = pty.openpty()
    arrived: list[bytes] = []

    def read() -> None:
        while True:
            try:
                arrived.append(os.read(master, 65536))
            except OSError:  # all is read, and the other end is closed
                return

    reader = threading.Thread(target=read)
    reader.start()
    with open(slave, "w", encoding="utf-8") as stream:  # noqa: PTH123  a descriptor
        code = _run(stream, arguments)
    reader.join()
    os.close(master)
    return code, b"".join(arrived).decode().replace("\r\n", "\n")


def _run(stream: io.TextIOWrapper, arguments: tuple[str, ...]) -> int:
    with redirect_stdout(stream), redirect_stderr(stream):
        try:
            main(list(arguments))
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else 1
    return 0


def cells(text: str) -> int:
    """How many columns a terminal takes for `text`, by Unicode's own table."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )  # fmt: skip


def too_wide(text: str, width: int) -> list[str]:
    """Lines that are wider than `width` and could have been broken between words."""
    lines = ESCAPES.sub("", text).splitlines()
    return [line for line in lines if cells(line.rstrip()) > width and len(line.split()) > 1]


def write_file(path: Path, text: str) -> Path:
    """A file, its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
