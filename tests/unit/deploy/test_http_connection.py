"""A client's one HTTP connection: kept, and opened anew after a break."""

import http.server
import socket
import threading
from collections.abc import Iterator

import pytest

from fedshelf.deploy.address import Address
from fedshelf.deploy.connection_errors import ServerUnavailableError
from fedshelf.deploy.http_connection import HttpConnection
from fedshelf.serialization.blob import Buffer


class Handler(http.server.BaseHTTPRequestHandler):
    """Says how many bytes it was sent, and on which connection."""

    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        count = len(self.rfile.read(int(self.headers["content-length"])))
        content = f"{count} {self.client_address[1]}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"half" * 125)
        self.close_connection = True  # amid the content

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    """Hangs up on idle connections when told to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.connections: list[socket.socket] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def get_request(self) -> tuple[socket.socket, object]:
        connection, peer = super().get_request()
        self.connections.append(connection)
        return connection, peer

    @property
    def address(self) -> Address:
        return Address(host="127.0.0.1", port=self.server_port)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running
        running.shutdown()


@pytest.fixture
def line(server: Server) -> Iterator[HttpConnection]:
    opened = HttpConnection(server.address, None, timeout=20)
    yield opened
    opened.close()


def put(line: HttpConnection, *pieces: Buffer) -> tuple[int, int]:
    """How many bytes the server has got, and the client's port."""
    answer = line.send("PUT", "/x", {"content-length": str(sum(map(len, pieces)))}, pieces)
    count, port = answer.content.split()
    return int(count), int(port)


def test_pieces_go_out_one_after_the_other_on_one_connection(line: HttpConnection) -> None:
    first, second = put(line, b"abc", memoryview(b"defg")), put(line, b"x" * 1_000_000)
    assert (first[0], second[0]) == (7, 1_000_000)
    assert first[1] == second[1]


def test_a_connection_that_the_server_has_closed_meanwhile_is_opened_anew(server: Server, line: HttpConnection) -> None:
    _, port = put(line, b"abc")
    server.connections[0].shutdown(socket.SHUT_RDWR)
    assert put(line, b"abc")[1] != port


def test_a_break_amid_an_answer_is_a_server_that_is_away(line: HttpConnection) -> None:
    with pytest.raises(ServerUnavailableError):
        line.request("GET", "/", {})
    assert put(line, b"abc")[0] == 3


def test_nobody_there_is_a_server_that_is_away() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ServerUnavailableError):
        HttpConnection(Address(host="127.0.0.1", port=port), None, timeout=5).request("GET", "/", {})
