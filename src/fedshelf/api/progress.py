"""Progress of a run in a terminal or a notebook, without side effects on the caller's process."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedshelf.core.ports import MetricSink
from fedshelf.tracking.console import ConsoleSink
from fedshelf.tracking.terminal import make_console


@contextmanager
def shown_progress(*, progress: bool) -> Iterator[tuple[MetricSink, ...]]:
    """Yield the sinks that show progress; restore PyTorch's number of threads afterwards.

    Args:
        progress: whether to show anything. In a notebook, that is one line per round.
    """
    threads = torch.get_num_threads()
    console = ConsoleSink(make_console()) if progress else None
    try:
        yield () if console is None else (console,)
    finally:
        if console is not None:
            console.close()
        torch.set_num_threads(threads)
