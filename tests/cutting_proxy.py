"""A TCP proxy on loopback that counts what passes in each direction, and cuts or stalls connections when told to."""

import contextlib
import socket
import threading
from collections.abc import Iterator

from tests.ports import listener

UP, DOWN = "up", "down"  # to the server, and from it


class CuttingProxy:
    """Listens from the moment it is made. `passed` counts the bytes of each direction over all connections."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = listener()
        self.address = "{}:{}".format(*self._listener.getsockname())
        self.passed = {UP: 0, DOWN: 0}
        self.num_cuts = 0
        self.stalled = threading.Event()
        self._cuts: dict[str, list[int]] = {UP: [], DOWN: []}
        self._stall: tuple[str, int] | None = None
        self._go_on = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_at(self, direction: str, *marks: int) -> None:
        """Break the connection that carries byte number `marks` (from now on) of a direction."""
        with self._lock:
            self._cuts[direction] = sorted(self.passed[direction] + mark for mark in marks)

    def stall_at(self, direction: str, mark: int) -> None:
        """Pass on byte number `mark` (from now on) of a direction, set `stalled`, and nothing more of that connection
        until `release`."""
        with self._lock:
            self._stall = (direction, self.passed[direction] + mark)

    def release(self) -> None:
        self._go_on.set()

    def close(self) -> None:
        self._listener.close()
        self.release()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(self._target) as server:
            back = threading.Thread(target=self._pump, args=(server, client, DOWN), daemon=True)
            back.start()
            self._pump(client, server, UP)
            back.join()

    def _pump(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if self._is_cut(direction, len(data)):
                    for end in (source, sink):
                        end.shutdown(socket.SHUT_RDWR)  # wakes the other direction's thread, too
                    return
                sink.sendall(data)
                if self._stalls(direction):
                    self.stalled.set()
                    self._go_on.wait()
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _stalls(self, direction: str) -> bool:
        with self._lock:
            if self._stall is None or self._stall[0] != direction or self.passed[direction] < self._stall[1]:
                return False
            self._stall = None
            return True

    def _is_cut(self, direction: str, count: int) -> bool:
        with self._lock:
            self.passed[direction] += count
            marks = self._cuts[direction]
            if not marks or self.passed[direction] < marks[0]:
                return False
            marks.pop(0)
            self.num_cuts += 1
            return True


@contextlib.contextmanager
def cutting_proxy(target: object) -> Iterator[CuttingProxy]:
    """A proxy to HOST:PORT, closed with the block."""
    host, _, port = str(target).rpartition(":")
    proxy = CuttingProxy((host, int(port)))
    try:
        yield proxy
    finally:
        proxy.close()
