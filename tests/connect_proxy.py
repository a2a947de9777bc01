"""An HTTP proxy on loopback that opens tunnels by CONNECT; whatever name is asked for, it leads to one target."""

import contextlib
import http.client
import socket
import threading
from collections.abc import Iterator

from tests.ports import listener


class ConnectProxy:
    """Listens from the moment it is made.

    Args:
        target: where all tunnels lead; None refuses them.
        status: what it answers to CONNECT.

    Attributes:
        asked: the head of each request.
    """

    def __init__(self, target: tuple[str, int] | None, status: int = 200) -> None:
        self._target = target
        self._status = status
        self._listener = listener()
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.asked: list[str] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += client.recv(1000)
            self.asked.append(head.decode())
            phrase = http.client.responses.get(self._status, "Odd")
            client.sendall(f"HTTP/1.1 {self._status} {phrase}\r\n\r\n".encode())
            if self._target is not None and self._status == 200:
                with socket.create_connection(self._target) as server:
                    back = threading.Thread(target=_pump, args=(server, client), daemon=True)
                    back.start()
                    _pump(client, server)
                    back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def connect_proxy(target: tuple[str, int] | None, status: int = 200) -> Iterator[ConnectProxy]:
    """A proxy, closed with the block."""
    proxy = ConnectProxy(target, status)
    try:
        yield proxy
    finally:
        proxy.close()
