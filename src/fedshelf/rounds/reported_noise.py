"""The noise that clients report with their uploads: records changes, and warns where it protects little."""

import logging
import math

from fedshelf.core.errors import UsageError
from fedshelf.core.events import NoiseReported
from fedshelf.core.messages import Mechanism
from fedshelf.core.ports import MetricSink
from fedshelf.core.text import counted
from fedshelf.privacy.base import DEFAULT_DELTA
from fedshelf.privacy.epsilon import renyi

logger = logging.getLogger(__name__)

WEAK_EPSILON = 12.0  # by RDP, which is up to a sixth above the exact value
LOUDEST = 20.0


class ReportedNoise:
    """Records noise.

    Args:
        sink: receives the events.
        delta: the run's δ.
        num_rounds: the run's number of rounds.
    """

    def __init__(self, sink: MetricSink, *, delta: float = DEFAULT_DELTA, num_rounds: int = 1) -> None:
        self._sink = sink
        self._delta = delta
        self._num_rounds = num_rounds
        self._known: dict[str, Mechanism] = {}
        self._has_warned: set[str] = set()

    def note(
        self, client: str, mechanism: Mechanism | None, *, size: int | None = None, is_discrete: bool = False
    ) -> None:  # fmt: skip
        """Record the noise of a client's uploads, if it is another than before.

        Args:
            client: the client; "" for the server.
            mechanism: the noise; None if there is none.
            size: the client's number of photos, or the server's number of clients; None if it is not known.
            is_discrete: whether the noise is that of the stores together, in integers.
        """
        if mechanism is not None and self._known.get(client) != mechanism:
            self._known[client] = mechanism
            self._sink.emit(
                NoiseReported(
                    client=client, noise_multiplier=mechanism.noise_multiplier,
                    sampling_rate=mechanism.sampling_rate, steps=mechanism.steps, is_discrete=is_discrete,
                )
            )  # fmt: skip
            self._warn_of_epsilon(client, mechanism, is_discrete=is_discrete)
            self._warn_of_delta(client, size)

    def _warn_of_epsilon(self, client: str, mechanism: Mechanism, *, is_discrete: bool) -> None:
        group, steps = (mechanism.noise_multiplier, mechanism.sampling_rate), mechanism.steps * self._num_rounds
        try:
            epsilon = renyi({group: steps}, self._delta, is_discrete=is_discrete) if group[0] else math.inf
        except UsageError:  # `dp-accounting` is not installed
            return
        if epsilon > WEAK_EPSILON:
            whom = f"each photo of '{client}'" if client else "each store"
            self._warn(
                "epsilon",
                f"the noise hardly protects {whom}: ε will be {epsilon:.3g} or somewhat less after "
                f"{counted(self._num_rounds, 'round')}. Choose the noise by --target-epsilon, at most 10",
            )

    def _warn_of_delta(self, client: str, size: int | None) -> None:
        if size and self._delta * size >= 1:
            what = f"photos of '{client}'" if client else "stores"
            self._warn(
                "delta",
                f"--delta {self._delta:g} is not below 1 / {size:,}, the number of {what}: publishing one of them at "
                "random would be as private. Choose a much smaller --delta",
            )

    def warn_of_volume(self, ratio: float, *, trains_head_only: bool = False) -> None:
        """Warn if the noise at the server drowns what stores send.

        Args:
            ratio: the norm of the noise on the mean, as a multiple of the clip norm.
            trains_head_only: whether the output layer alone is trained: then training fewer values is no advice.
        """
        if ratio > LOUDEST:
            fewer = "" if trains_head_only else ", or fewer trained values (--train head)"
            self._warn(
                "volume",
                f"the noise in the mean of a round is {ratio:,.0f}-fold the largest upload: the model will learn "
                f"nothing. It takes hundreds of stores in a round{fewer}",
            )

    def _warn(self, kind: str, sentence: str) -> None:
        if kind not in self._has_warned:
            self._has_warned.add(kind)
            logger.warning("%s", sentence)
