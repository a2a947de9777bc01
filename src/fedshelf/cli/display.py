"""What a long-running command shows while it runs, and how it is asked to stop."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

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
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second Ctrl-C ends at once."""
    stop = threading.Event()

    def ask(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        print(
            "stopping: the same command goes on with the open round; Ctrl-C once more to end at once", file=sys.stderr
        )

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
