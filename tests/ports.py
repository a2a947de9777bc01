"""Ports on loopback that no other test is given, neither in this process nor in another worker.

A client outlives its server by a few seconds. If the next test listened on the same port, it would hear that client.
The system hands out ephemeral ports again and again, so tests take theirs from a range below those, each worker from a
part of its own, one after the other.
"""

import itertools
import os
import random
import socket
from collections.abc import Iterator

FIRST, PER_WORKER, WORKERS = 12_000, 1_000, 20


def _ports_of_this_worker() -> range:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS
    return range(FIRST + worker * PER_WORKER, FIRST + (worker + 1) * PER_WORKER)


def _rotated(ports: range) -> Iterator[int]:
    """Start anywhere, so that two test runs on one machine seldom meet."""
    start = random.SystemRandom().randrange(len(ports))
    return itertools.cycle([*ports[start:], *ports[:start]])


_next_ports = _rotated(_ports_of_this_worker())


def free_port() -> int:
    """A port where a server may listen. It stays bound here, so that nobody else's search finds it."""
    for _, port in zip(range(PER_WORKER), _next_ports, strict=False):
        reserved = socket.socket()
        try:
            reserved.bind(("127.0.0.1", port))  # fails where anybody listens, or did a moment ago
        except OSError:
            reserved.close()
            continue
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # now a server may bind it, too
        reserved.detach()  # stays open
        return port
    raise RuntimeError(f"none of {PER_WORKER} ports is free")


def listener() -> socket.socket:
    """A socket that listens on such a port."""
    return socket.create_server(("127.0.0.1", free_port()))
