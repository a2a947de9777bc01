"""What a long-running command shows while it runs, and how it is asked to stop."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fedshelf.core.child_process import STOP_SIGNALS

STOPPING = "stopping after the current step; press Ctrl-C again to end at once"

if TYPE_CHECKING:
    from fedshelf.core.ports import MetricSink


@contextmanager
def watching(*, as_json: bool) -> Iterator["MetricSink"]:
    """Where events are shown: a live display, or one JSON object a line."""
    from fedshelf.tracking.console import ConsoleSink
    from fedshelf.tracking.sinks import JsonLinesSink

    if as_json:
        yield JsonLinesSink(sys.stdout)
        return
    console = ConsoleSink()
    try:
        yield console
    finally:
        console.close()


@contextmanager
def stop_on_signals(said: str = STOPPING) -> Iterator[threading.Event]:
    """An event that Ctrl-C, SIGTERM or a terminal that closes sets; a second Ctrl-C ends at once.

    Args:
        said: to the user, once the event is set.
    """
    stop = threading.Event()

    def ask(number: int, frame: object) -> None:
        if not stop.is_set():
            stop.set()
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, f"{said}\n".encode())  # not print(): the signal may have come in the midst of one
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup's SIGHUP
    before = {number: signal.signal(number, ask) for number in handled}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
