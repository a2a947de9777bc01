"""The server's side of *wire* on any peer: when rounds begin and end, and figures as of `benchmarks.wire_limit`.

Without its anonymous memory: a thread that looks every 10 ms would slow a peer down.
"""

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import wire_limit
from benchmarks.wire_limit import NUM_CLIENTS


class WireRounds:
    """Call `begin` when the first round begins and `end_round` at the end of each."""

    def __init__(self, megabytes: int) -> None:
        self.megabytes = megabytes
        self.marks: list[float] = []
        self.bytes_before: int | None = None

    def first_model(self) -> NDArray[np.float32]:
        return wire_limit.first_model(wire_limit.num_values(self.megabytes))

    def begin(self) -> None:
        self.bytes_before = wire_limit.loopback_bytes()
        self.marks.append(time.perf_counter())

    def end_round(self) -> None:
        self.marks.append(time.perf_counter())

    def figures(self, model: NDArray[np.float32], *, helpers: Sequence[int] = ()) -> str:
        """JSON, after the last round.

        Args:
            model: what the rounds ended with.
            helpers: process ids that belong to the server and are not this one; their peaks are added.

        Raises:
            ValueError: the model is not the mean of what the clients sent.
        """
        seconds = [after - before for before, after in itertools.pairwise(self.marks)]
        peak = wire_limit.peak_bytes() + sum(_peak_bytes(process) for process in helpers)
        after, nominal = wire_limit.loopback_bytes(), 2 * NUM_CLIENTS * model.nbytes * len(seconds)
        known = self.bytes_before is not None and after is not None
        wire_limit.check(model, NUM_CLIENTS)
        return json.dumps(
            {
                "round_seconds": seconds, "server_peak_mb": peak / 1_000_000,
                "lo_ratio": (after - self.bytes_before) / nominal if known else None,  # type: ignore[operator]
            }
        )  # fmt: skip


def _peak_bytes(process: int) -> int:
    """The highest resident size of another process."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
