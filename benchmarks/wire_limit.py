"""The limit of *wire*: a model goes to client processes and back over plain sockets, with one addition in place.

    python -m benchmarks.wire_limit server 100 4            # megabytes of float32, clients
    python -m benchmarks.wire_limit client 100 PORT NUMBER

In every round the server sends its model to each client; client i (from 0) adds (i + 1)² + 10 · round to every value
and sends the model back; the server sums what it reads and takes the mean. It prints its `Figures` as a line of JSON.
"""

import itertools
import json
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NUM_CLIENTS = 4
NUM_ROUNDS = 5
SAMPLING_SECONDS = 0.01
TIMEOUT_SECONDS = 120.0
BLOCK = 1 << 18  # values that are read and added at a time: a block fits into the second-level cache


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What the server measures.

    Attributes:
        round_seconds: Seconds of each round.
        server_peak_mb: The highest resident size, mapped files in the page cache included.
        server_peak_anonymous_mb: The highest anonymous memory during the rounds, sampled every 10 ms; None where the
            system does not tell.
        server_idle_anonymous_mb: Anonymous memory just before the first round, with the model in memory and all clients
            connected; None where the system does not tell.
        lo_ratio: Bytes on the loopback interface over 2 · clients · model · rounds, other traffic included; None where
            the system does not tell.
    """

    round_seconds: list[float]
    server_peak_mb: float
    server_peak_anonymous_mb: float | None
    server_idle_anonymous_mb: float | None
    lo_ratio: float | None


class AnonymousMemory:
    """Samples the anonymous resident memory of this process in a thread.

    Attributes:
        idle: Bytes at the start.
        peak: The most bytes so far.
    """

    def __init__(self) -> None:
        self.idle = self.peak = status_bytes("RssAnon:")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> tuple[int | None, int | None]:
        """Stop sampling, and return `idle` and `peak`."""
        self._stopped.set()
        self._thread.join()
        return self.idle, self.peak

    def _sample(self) -> None:
        while not self._stopped.wait(SAMPLING_SECONDS):
            self.peak = max(self.peak or 0, status_bytes("RssAnon:") or 0) or None


def status_bytes(entry: str, process: int | str = "self") -> int | None:
    """Return an entry of /proc/PROCESS/status in bytes; None where the system does not tell."""
    path = Path(f"/proc/{process}/status")
    if not path.exists():
        return None
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return next((int(words[1]) * 1024 for words in lines if words and words[0] == entry), None)


def num_values(megabytes: int) -> int:
    """Return the number of float32 values in so many megabytes."""
    return megabytes * 1_000_000 // 4


def first_model(count: int) -> NDArray[np.float32]:
    """Return small integers: their sums are exact, so the result can be checked to the last bit."""
    return np.resize(np.arange(251, dtype=np.float32), count)


def change(client: int, round: int) -> int:
    """Return what a client adds to every value in a round.

    It differs in every round, so that nothing can be left unsent. It contains a square, because the mean over fewer of
    the four clients then differs from the mean over all: no client can be left out.
    """
    return (client + 1) ** 2 + 10 * round


def check(model: NDArray[np.float32], num_clients: int, *, first_models: int = 1) -> None:
    """Check the model after all rounds: `first_models` times the first model, plus the mean of all changes.

    Args:
        model: The model after the last round.
        num_clients: The number of clients.
        first_models: How many times the first model is in it.

    Raises:
        ValueError: Something was lost, or added twice.
    """
    changes = [change(client, number) for client in range(num_clients) for number in range(1, NUM_ROUNDS + 1)]
    expected = first_model(len(model)) * np.float32(first_models) + np.float32(sum(changes) / num_clients)
    if not np.array_equal(model, expected):
        raise ValueError("the model after the last round is not the mean of what the clients sent")


def loopback_bytes() -> int | None:
    """Return the bytes sent on the loopback interface since boot; None where the system does not tell."""
    path = Path("/proc/net/dev")
    if not path.exists():
        return None
    lines = (line.split(":") for line in path.read_text(encoding="utf-8").splitlines() if ":" in line)
    return next((int(counters.split()[8]) for name, counters in lines if name.strip() == "lo"), None)


def peak_bytes() -> int:
    """Return the highest resident size of this process. Linux counts the parent's before exec in `ru_maxrss`."""
    if (peak := status_bytes("VmHWM:")) is not None:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class WireRounds:
    """Measures the rounds of a server of *wire*, in its process.

    Args:
        megabytes: Size of the model.
        num_clients: The number of clients.
        sample_memory: Whether to sample anonymous memory; the thread that does it would slow a peer down.
    """

    def __init__(self, megabytes: int, num_clients: int = NUM_CLIENTS, *, sample_memory: bool = False) -> None:
        self.megabytes, self.num_clients, self.sample_memory = megabytes, num_clients, sample_memory
        self.times: list[float] = []
        self.bytes_before: int | None = None
        self.sampler: AnonymousMemory | None = None

    def first_model(self) -> NDArray[np.float32]:
        """Return the model of the first round."""
        return first_model(num_values(self.megabytes))

    def begin(self) -> None:
        """Call when the first round begins."""
        self.sampler = AnonymousMemory() if self.sample_memory else None
        self.bytes_before = loopback_bytes()
        self.times.append(time.perf_counter())

    def end_round(self) -> None:
        """Call at the end of each round."""
        self.times.append(time.perf_counter())

    def figures(self, model: NDArray[np.float32], *, first_models: int = 1, other_processes: Sequence[int] = ()) -> str:
        """Check the result, and return `Figures` as JSON. Call it after the last round.

        Args:
            model: The model after the last round.
            first_models: How many times the first model is in it.
            other_processes: Ids of the server's other processes, whose peak memory is added.

        Raises:
            ValueError: The model is not what the clients have sent.
        """
        bytes_after = loopback_bytes()
        idle, peak_anonymous = self.sampler.stop() if self.sampler else (None, None)
        peak = peak_bytes() + sum(status_bytes("VmHWM:", other) or 0 for other in other_processes)
        nominal = 2 * self.num_clients * model.nbytes * (len(self.times) - 1)
        known = self.bytes_before is not None and bytes_after is not None
        figures = Figures(
            round_seconds=[after - before for before, after in itertools.pairwise(self.times)],
            server_peak_mb=peak / 1_000_000,
            server_peak_anonymous_mb=peak_anonymous and peak_anonymous / 1_000_000,
            server_idle_anonymous_mb=idle and idle / 1_000_000,
            lo_ratio=(bytes_after - self.bytes_before) / nominal if known else None,  # type: ignore[operator]
        )
        check(model, self.num_clients, first_models=first_models)  # last, since it needs memory
        return json.dumps(asdict(figures))


def serve(megabytes: int, num_clients: int) -> str:
    """Start the clients, run the rounds, check the result, and return the figures as JSON."""
    rounds = WireRounds(megabytes, num_clients, sample_memory=True)
    model = rounds.first_model()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT_SECONDS)
        port = listener.getsockname()[1]
        command = [sys.executable, "-m", __spec__.name, "client", str(megabytes), str(port)]
        clients = [subprocess.Popen([*command, str(i)]) for i in range(num_clients)]
        connections = [listener.accept()[0] for _ in clients]
    total = np.empty_like(model)
    rounds.begin()
    for _ in range(NUM_ROUNDS):
        for connection in connections:
            connection.sendall(model.data)
        _average(connections, total)
        model, total = total, model
        rounds.end_round()
    figures = rounds.figures(model)
    for connection in connections:
        connection.close()
    for client in clients:
        client.wait()
    return figures


def _average(connections: list[socket.socket], total: NDArray[np.float32]) -> None:
    """Write the mean of what all clients send into `total`, block by block."""
    block = np.empty(BLOCK, np.float32)
    for start in range(0, len(total), BLOCK):
        part = total[start : start + BLOCK]
        _read(connections[0], part)
        for connection in connections[1:]:
            _read(connection, block[: len(part)])
            part += block[: len(part)]
        part *= 1 / len(connections)


def _read(connection: socket.socket, values: NDArray[np.float32]) -> None:
    view = values.data.cast("B")
    while view:
        count = connection.recv_into(view)
        if not count:
            raise ConnectionError("the other side closed the connection in the middle of a model")
        view = view[count:]


def take_part(megabytes: int, port: int, client: int) -> None:
    """Run a client: return the changed model in every round."""
    model = np.empty(num_values(megabytes), np.float32)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for number in range(1, NUM_ROUNDS + 1):
            _read(connection, model)
            model += change(client, number)
            connection.sendall(model.data)


if __name__ == "__main__":
    role, *numbers = sys.argv[1:]
    if role == "server":
        print(serve(*map(int, numbers)))
    else:
        take_part(*map(int, numbers))
