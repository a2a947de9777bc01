"""The entry point of all programs: `fedshelf`, `python -m fedshelf`, `server.py` and `client.py`."""

import os
import signal
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C, as in a shell."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; see `fedshelf.cli.app.main`.

    Ctrl-C ends the process quietly and at once, until a command has something to clean up and installs its own handler
    (`cli.display`): an exception in the middle of an import is printed, or swallowed, by what is imported. This module
    therefore imports nothing heavy.

    Args:
        arguments: the arguments; None uses the process's.

    Raises:
        SystemExit: with the exit code, if it is not 0.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not in the background, where a shell ignores it
        signal.signal(signal.SIGINT, _exit)
    from fedshelf.cli import main as run

    run(arguments)


def _exit(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
