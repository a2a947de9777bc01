"""A TCP proxy on loopback that keeps what clients send: every byte that leaves them through their socket."""

import contextlib
import socket
import threading
from collections.abc import Iterator

from tests.ports import listener


class RecordingProxy:
    """Listens from the moment it is made; `streams` holds each connection's bytes from client to server."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = listener()
        self.address = "{}:{}".format(*self._listener.getsockname())
        self.streams: list[bytearray] = []
        self._carriers: list[threading.Thread] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def wait_for_the_end(self, seconds: float = 30.0) -> None:
        """Wait until every connection so far has ended, so that all that was sent is in `streams`."""
        for carrier in list(self._carriers):
            carrier.join(seconds)
            assert not carrier.is_alive()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                self._carriers.append(threading.Thread(target=self._carry, args=(client,), daemon=True))
                self._carriers[-1].start()

    def _carry(self, client: socket.socket) -> None:
        # Either side may break off; the other then sees it.
        with client, contextlib.suppress(OSError), socket.create_connection(self._target) as server:
            stream = bytearray()
            self.streams.append(stream)
            back = threading.Thread(target=_pump, args=(server, client, None), daemon=True)
            back.start()
            _pump(client, server, stream)
            back.join()


def _pump(source: socket.socket, sink: socket.socket, record: bytearray | None) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            if record is not None:
                record += data
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def recording_proxy(target: str) -> Iterator[RecordingProxy]:
    """A proxy to HOST:PORT, closed with the block."""
    host, _, port = target.rpartition(":")
    proxy = RecordingProxy((host, int(port)))
    try:
        yield proxy
    finally:
        proxy.close()
