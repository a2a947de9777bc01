"""Combines several sinks, and writes events as JSON."""

import logging
from collections.abc import Sequence
from typing import TextIO

from fedshelf.core.events import Event
from fedshelf.core.ports import MetricSink
from fedshelf.core.system_errors import reason
from fedshelf.serialization import records

logger = logging.getLogger(__name__)


class Sinks:
    """Passes each event to all sinks in order, the required ones first.

    Args:
        required: sinks whose errors propagate, such as the run database: a run that cannot be recorded must not
            continue.
        optional: sinks such as a console; one that fails is logged once and then skipped.
    """

    def __init__(self, *, required: Sequence[MetricSink] = (), optional: Sequence[MetricSink] = ()) -> None:
        self._required = tuple(required)
        self._optional = list(optional)

    def emit(self, event: Event) -> None:
        """Pass an event to all sinks.

        Raises:
            RunError: a required sink cannot record it.
        """
        for sink in self._required:
            sink.emit(event)
        for sink in list(self._optional):
            try:
                sink.emit(event)
            except Exception as error:
                is_expected = isinstance(error, OSError)  # such as a full disk
                why = f": {reason(error)}" if is_expected else ""
                logger.warning(
                    "%s fails and is left out; the run continues%s", type(sink).__name__, why, exc_info=not is_expected
                )
                self._optional.remove(sink)


class JsonLinesSink:
    """Writes each event immediately as one line of JSON.

    Args:
        stream: the output.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def emit(self, event: Event) -> None:
        """Write an event."""
        self._stream.write(records.to_json(event, ascii=True) + "\n")
        self._stream.flush()
