"""Several sinks as one, and the sink that programs read."""

import logging
from collections.abc import Sequence
from typing import TextIO

from fedshelf.core.events import Event
from fedshelf.core.ports import MetricSink
from fedshelf.serialization import records

logger = logging.getLogger(__name__)


class Sinks:
    """Passes each event to all sinks, the required ones first, in order.

    Args:
        required: the run database, say: a run that cannot be written down must not go on, so their errors are
            the caller's.
        optional: a console, say: one that fails is named in the log once and left out from then on.
    """

    def __init__(self, *, required: Sequence[MetricSink] = (), optional: Sequence[MetricSink] = ()) -> None:
        self._required = tuple(required)
        self._optional = list(optional)

    def emit(self, event: Event) -> None:
        """Pass it on.

        Raises:
            RunError: a required sink cannot write it down.
        """
        for sink in self._required:
            sink.emit(event)
        for sink in list(self._optional):
            try:
                sink.emit(event)
            except Exception:
                logger.warning("%s fails and is left out; the run goes on", type(sink).__name__, exc_info=True)
                self._optional.remove(sink)


class JsonLinesSink:
    """One event a line, as JSON, at once."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def emit(self, event: Event) -> None:
        self._stream.write(records.to_json(event, ascii=True) + "\n")
        self._stream.flush()
