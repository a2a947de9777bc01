"""Stopping long-running work by Ctrl-C and other signals."""

import contextlib
import os
import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from fedshelf.core.child_process import STOP_SIGNALS

STOPPING, AGAIN = "stopping after the current step", "; press Ctrl-C again to exit at once"


@contextmanager
def stop_on_signals(
    said: str = STOPPING, signals: Collection[signal.Signals] = STOP_SIGNALS
) -> Iterator[threading.Event]:  # fmt: skip
    """Yield an event that is set by signals such as Ctrl-C, SIGTERM or a closing terminal.

    A second Ctrl-C raises KeyboardInterrupt. Outside of the main thread, where Python handles no signals, they keep
    their effect.

    Args:
        said: the message to print when the event is set; after Ctrl-C, with how to exit at once.
        signals: the signals.
    """
    stop = threading.Event()

    def ask(number: int, frame: object) -> None:
        if not stop.is_set():
            stop.set()
            with contextlib.suppress(OSError):  # the terminal may be closed
                text = said + AGAIN * (number == signal.SIGINT)
                os.write(2, f"{text}\n".encode())  # not print(): the signal may have interrupted one
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    handled = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]  # nohup's SIGHUP
    before = {number: signal.signal(number, ask) for number in handled}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
