"""The limit of *wire*: a model to client processes and back over plain sockets, and one addition in place.

    python -m benchmarks.wire_limit 100 [--clients 16]     # megabytes of float32

Every round the server sends its model to each client; client i (from 0) adds (i + 1)² + 10 · round to every value and
sends the model back; the server adds up what it reads and takes the mean. One line of JSON comes out, see `Figures`.
"""

import argparse
import json
import resource
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NUM_CLIENTS = 4
NUM_ROUNDS = 5
SAMPLING_SECONDS = 0.01
BLOCK = 1 << 18  # values that are read and added at a time: a block fits the second-level cache


@dataclass(frozen=True, kw_only=True)
class Figures:
    """`lo_ratio` is bytes on the loopback interface over 2 · clients · model · rounds, of all rounds together.

    Whatever else talks on the interface meanwhile is counted, too. `server_peak_mb` is the highest resident size,
    files in the page cache that the server looks at included; `server_peak_anonymous_mb` is what is the server's own
    (looked at every 10 ms during the rounds), and `server_idle_anonymous_mb` the same just before the first round,
    with the model in memory and all clients there. Both are None where the system does not tell.
    """

    round_seconds: list[float]
    server_peak_mb: float
    server_peak_anonymous_mb: float | None
    server_idle_anonymous_mb: float | None
    lo_ratio: float | None


class AnonymousMemory:
    """Watches this process' anonymous resident memory from a thread, from the moment it is made."""

    def __init__(self) -> None:
        self.idle = self.peak = anonymous_bytes()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLING_SECONDS):
            self.peak = max(self.peak or 0, anonymous_bytes() or 0) or None


def anonymous_bytes() -> int | None:
    """This process' anonymous resident memory now; None where the system does not tell."""
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return next((int(words[1]) * 1024 for words in lines if words and words[0] == "RssAnon:"), None)


def num_values(megabytes: int) -> int:
    return megabytes * 1_000_000 // 4


def first_model(count: int) -> NDArray[np.float32]:
    """Small whole numbers: sums of them are exact, so the result can be checked to the last bit."""
    return np.resize(np.arange(251, dtype=np.float32), count)


def change(client: int, round: int) -> int:
    """What a client adds to every value: never the same twice, so that nothing can be left unsent. Squares, because no
    fewer of the four clients have the same mean as all of them: none can be left out either."""
    return (client + 1) ** 2 + 10 * round


def check(model: NDArray[np.float32], num_clients: int, *, first_models: int = 1) -> None:
    """After all rounds the model is `first_models` times the first one plus the mean of all changes.

    Raises:
        ValueError: it is not: something was lost, or added twice.
    """
    changes = [change(client, number) for client in range(num_clients) for number in range(1, NUM_ROUNDS + 1)]
    expected = first_model(len(model)) * np.float32(first_models) + np.float32(sum(changes) / num_clients)
    if not np.array_equal(model, expected):
        raise ValueError("the model after the last round is not the mean of what the clients sent")


def loopback_bytes() -> int | None:
    """Bytes sent on the loopback interface since the machine started; None where that cannot be known."""
    path = Path("/proc/net/dev")
    if not path.exists():
        return None
    lines = (line.split(":") for line in path.read_text(encoding="utf-8").splitlines() if ":" in line)
    return next((int(counters.split()[8]) for name, counters in lines if name.strip() == "lo"), None)


def peak_bytes() -> int:
    """The highest resident size of this process. Linux' `ru_maxrss` would count its parent's, too, from before exec."""
    path = Path("/proc/self/status")
    if not path.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return next(int(words[1]) * 1024 for words in lines if words and words[0] == "VmHWM:")


def figures(
    round_seconds: list[float], megabytes: int, num_clients: int, bytes_before: int | None, memory: AnonymousMemory
) -> Figures:
    """To be called in the server's process at the end of the last round."""
    memory.stop()
    bytes_after = loopback_bytes()
    nominal = 2 * num_clients * 4 * num_values(megabytes) * len(round_seconds)
    known = bytes_before is not None and bytes_after is not None
    return Figures(
        round_seconds=round_seconds,
        server_peak_mb=peak_bytes() / 1_000_000,
        server_peak_anonymous_mb=memory.peak and memory.peak / 1_000_000,
        server_idle_anonymous_mb=memory.idle and memory.idle / 1_000_000,
        lo_ratio=(bytes_after - bytes_before) / nominal if known else None,  # type: ignore[operator]
    )


def serve(megabytes: int, num_clients: int) -> Figures:
    """Start the clients, run the rounds, check the result."""
    model = first_model(num_values(megabytes))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        command = [sys.executable, "-m", __spec__.name, str(megabytes), "--port", str(port), "--client"]
        clients = [subprocess.Popen([*command, str(i)]) for i in range(num_clients)]
        connections = [listener.accept()[0] for _ in clients]
    bytes_before, round_seconds = loopback_bytes(), []
    memory = AnonymousMemory()
    total = np.empty_like(model)
    for _ in range(NUM_ROUNDS):
        started = time.perf_counter()
        for connection in connections:
            connection.sendall(model.data)
        _add_up(connections, total)
        model, total = total, model
        round_seconds.append(time.perf_counter() - started)
    result = figures(round_seconds, megabytes, num_clients, bytes_before, memory)
    for connection in connections:
        connection.close()
    for client in clients:
        client.wait()
    check(model, num_clients)
    return result


def _add_up(connections: list[socket.socket], total: NDArray[np.float32]) -> None:
    """The mean of what all clients send, block by block into `total`."""
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
            raise ConnectionError("the other side has gone in the middle of a model")
        view = view[count:]


def take_part(megabytes: int, port: int, client: int) -> None:
    """Answer with the model changed, as often as rounds there are."""
    model = np.empty(num_values(megabytes), np.float32)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for number in range(1, NUM_ROUNDS + 1):
            _read(connection, model)
            model += change(client, number)
            connection.sendall(model.data)


def power_of_two(text: str) -> int:
    """A number of clients whose mean is exact, so that the result can be checked to the last bit."""
    number = int(text)
    if number < 1 or number & (number - 1):
        raise argparse.ArgumentTypeError("must be a power of two: then the mean is exact and can be checked")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description="Move a model over plain sockets.")
    parser.add_argument("megabytes", type=int)
    parser.add_argument("--clients", type=power_of_two, default=NUM_CLIENTS, help="client processes (default: 4)")
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client is None:
        print(json.dumps(asdict(serve(arguments.megabytes, arguments.clients))))
    else:
        take_part(arguments.megabytes, arguments.port, arguments.client)


if __name__ == "__main__":
    main()
