"""The noise that clients report with their uploads, recorded when it changes."""

from fedshelf.core.events import NoiseReported
from fedshelf.core.messages import Mechanism
from fedshelf.core.ports import MetricSink


class ReportedNoise:
    """Records noise.

    Args:
        sink: receives the events.
    """

    def __init__(self, sink: MetricSink) -> None:
        self._sink = sink
        self._known: dict[str, Mechanism] = {}

    def note(self, client: str, mechanism: Mechanism | None) -> None:
        """Record the noise of a client's uploads, if it is another than before.

        Args:
            client: the client; "" for the server.
            mechanism: the noise; None if there is none.
        """
        if mechanism is not None and self._known.get(client) != mechanism:
            self._known[client] = mechanism
            self._sink.emit(
                NoiseReported(
                    client=client, noise_multiplier=mechanism.noise_multiplier,
                    sampling_rate=mechanism.sampling_rate, steps=mechanism.steps,
                )
            )  # fmt: skip
