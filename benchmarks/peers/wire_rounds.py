"""The server's side of *wire* on any peer: when rounds begin and end, and the figures of `benchmarks.wire_limit`.

Anonymous memory is not measured: a thread that samples every 10 ms would slow a peer down.
"""

import itertools
import json
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks import wire_limit
from benchmarks.wire_limit import NUM_CLIENTS


class WireRounds:
    """Measures the rounds.

    Args:
        megabytes: Size of the model.
    """

    def __init__(self, megabytes: int) -> None:
        self.megabytes = megabytes
        self.times: list[float] = []
        self.bytes_before: int | None = None

    def first_model(self) -> NDArray[np.float32]:
        """Return the model of the first round."""
        return wire_limit.first_model(wire_limit.num_values(self.megabytes))

    def begin(self) -> None:
        """Call when the first round begins."""
        self.bytes_before = wire_limit.loopback_bytes()
        self.times.append(time.perf_counter())

    def end_round(self) -> None:
        """Call at the end of each round."""
        self.times.append(time.perf_counter())

    def figures(self, model: NDArray[np.float32], *, other_processes: Sequence[int] = ()) -> str:
        """Return the figures as JSON, after the last round.

        Args:
            model: The model after the last round.
            other_processes: Ids of the server's other processes, whose peak memory is added.

        Raises:
            ValueError: The model is not the mean of what the clients sent.
        """
        seconds = [after - before for before, after in itertools.pairwise(self.times)]
        peak = wire_limit.peak_bytes() + sum(wire_limit.status_bytes("VmHWM:", other) or 0 for other in other_processes)
        after, nominal = wire_limit.loopback_bytes(), 2 * NUM_CLIENTS * model.nbytes * len(seconds)
        known = self.bytes_before is not None and after is not None
        wire_limit.check(model, NUM_CLIENTS)
        return json.dumps(
            {
                "round_seconds": seconds, "server_peak_mb": peak / 1_000_000,
                "lo_ratio": (after - self.bytes_before) / nominal if known else None,  # type: ignore[operator]
            }
        )  # fmt: skip
