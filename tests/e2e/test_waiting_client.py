"""A client whose server is not there, not right, or not ready: it says so, does not fill a log with it, and joins when
it can."""

import contextlib
import datetime
import functools
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from flwr.app import Message

from fedshelf.core.errors import TransportError, UsageError
from fedshelf.core.messages import PROTOCOL_VERSION
from fedshelf.deploy import client_loop, credentials, flower_client, greeting, http_connection, patience, registration
from fedshelf.deploy.address import Address
from fedshelf.deploy.client_part import EndKind
from fedshelf.deploy.flower_engine import FlowerEngine
from fedshelf.deploy.flower_server import EmbeddedServer
from fedshelf.deploy.tls import ensure_server_tls, issue, read_certificate, read_key
from fedshelf.deploy.waiting import WaitReporter
from fedshelf.identity.chain import Chain
from tests.connect_proxy import connect_proxy
from tests.ports import free_port, listener
from tests.unit.deploy.echo import PATIENCE, ThreadClient, joined

pytestmark = pytest.mark.e2e


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses and waits are short, or a test would take minutes."""
    monkeypatch.setattr(patience, "PAUSES", (0.02,))
    monkeypatch.setattr(client_loop, "WaitReporter", functools.partial(WaitReporter, first=0.2))


class Answering(http.server.ThreadingHTTPServer):
    """Answers all requests alike, and counts them."""

    def __init__(self, status: int, content: bytes, headers: Mapping[str, str], port: int = 0) -> None:
        outer = self
        self.paths: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                outer.paths.append(self.path)
                self.rfile.read(int(self.headers.get("content-length", 0)))
                is_health = self.path == "/fedshelf/health"
                self.send_response_only(200 if is_health and content else status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", port), Handler)


@pytest.fixture
def answering() -> Iterator[Callable[..., Answering]]:
    """Makes servers that answer all requests alike."""
    servers = []

    def make(status: int, content: bytes = b"", **headers: str) -> Answering:
        servers.append(Answering(status, content, headers))
        threading.Thread(target=servers[-1].serve_forever, args=(0.05,), daemon=True).start()
        return servers[-1]

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_server_that_is_not_there_is_told_once_and_then_at_growing_intervals() -> None:
    with (
        ThreadClient(f"127.0.0.1:{free_port()}", "lyon", max_wait=4.0) as client,
        pytest.raises(TransportError, match=r"did not answer for 4 s \(cannot connect .* connection refused"),
    ):
        client.result.result(PATIENCE)
    first, second, *rest = client.statuses
    assert first.startswith("connecting to 127.0.0.1:")
    assert second.startswith("cannot connect to the server at 127.0.0.1:")
    assert second.endswith("connection refused; check that it runs, and its port; trying again")
    assert 1 <= len(rest) <= 6, "of more than a hundred attempts"
    assert all(line.startswith("waiting for the server at 127.0.0.1:") for line in rest)
    assert all(line.endswith("connection refused; check that it runs, and its port") for line in rest)


def test_a_server_that_loses_every_registration_does_not_fill_the_log(answering: Callable[..., Answering]) -> None:
    health = json.dumps({"protocol": PROTOCOL_VERSION, "version": "x"}).encode()
    server = answering(401, health)
    with ThreadClient(f"127.0.0.1:{server.server_port}", "lyon") as client:
        client.says("to the request to enroll")
        deadline = time.monotonic() + PATIENCE
        while len(server.paths) < 100 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert len(server.paths) >= 100
    assert len(client.statuses) < 12, client.statuses


def test_a_server_that_is_started_again_and_again_is_told_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(registration, "GLITCH_SECONDS", 0.0)
    chain = Chain(tmp_path, is_open=True)
    port, joins = free_port(), 0
    with ThreadClient(f"127.0.0.1:{port}", "lyon") as client:
        for _ in range(6):
            with EmbeddedServer(host="127.0.0.1", port=port, tls=None, chain=chain) as server:
                joins += len(joined(server.transport()))
    assert joins == 6
    for text in ("connected to", "was lost", "cannot connect"):
        assert 1 <= sum(text in status for status in client.statuses) <= 3, client.statuses


def test_what_stands_in_front_of_a_server_that_does_not_run_is_waited_for(answering: Callable[..., Answering]) -> None:
    server = answering(503)
    with ThreadClient(f"127.0.0.1:{server.server_port}", "lyon") as client:
        client.says("answers 503: something stands in front of a server that does not run; trying again")


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b"<html>sign in to the Wi-Fi</html>", {}),
        (b"[]", {}),
        (b"{}", {}),
        (b"[" * 100_000, {}),
    ],
)
def test_another_program_is_named_and_waited_out(
    answering: Callable[..., Answering], content: bytes, headers: dict[str, str]
) -> None:
    server = answering(200, content, **headers)
    with ThreadClient(f"127.0.0.1:{server.server_port}", "lyon") as client:
        client.says("answers, but is not a FedShelf server: check --server-address; trying again")


def test_another_program_that_takes_the_port_for_a_while_is_waited_out(tmp_path: Path) -> None:
    chain = Chain(tmp_path, is_open=True)
    server = EmbeddedServer(host="127.0.0.1", port=free_port(), tls=None, chain=chain)
    with server, ThreadClient(server.address, "lyon") as client:
        joined(server.transport())
        server.close()
        with Answering(200, b"{}", {}, server.address.port) as other:
            threading.Thread(target=other.serve_forever, daemon=True).start()
            client.says("is not a FedShelf server: check --server-address; trying again")
            other.shutdown()
        with EmbeddedServer(host="127.0.0.1", port=server.address.port, tls=None, chain=chain) as back:
            transport = back.transport()
            joined(transport)
            transport.close("run finished")
            assert client.result.result(PATIENCE).kind is EndKind.CLOSED


def test_a_server_that_says_nothing_is_told_while_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "PROBE_SECONDS", 0.2)
    with listener() as silent:
        address = "{}:{}".format(*silent.getsockname())
        with ThreadClient(address, "lyon") as client:
            line = client.says(f"waiting for the server at {address} (")
            assert "it has not answered so far; check that a FedShelf server listens there" in line
            client.stop.set()
            silent.accept()[0].close()


@pytest.mark.parametrize("drips", [False, True], ids=["silent", "a byte at a time"])
@pytest.mark.parametrize("insecure", [True, False], ids=["plain", "TLS"])
def test_the_maximum_wait_is_kept_when_a_peer_accepts_and_does_not_answer(drips: bool, insecure: bool) -> None:
    """Not by the connection's timeout, which is about one packet."""

    def drip(peer: socket.socket, over: threading.Event) -> None:
        with peer, contextlib.suppress(OSError):
            peer.sendall(b"HTTP/1.1 200 OK\r\nX-Long: " if insecure else b"\x16\x03\x03\x3f\xff")
            while not over.wait(0.05):
                peer.sendall(b"x")

    over = threading.Event()
    with listener() as peer:
        address = "{}:{}".format(*peer.getsockname())
        with ThreadClient(address, "lyon", max_wait=0.5, insecure=insecure) as client:
            if drips:
                threading.Thread(target=drip, args=(peer.accept()[0], over), daemon=True).start()
            with pytest.raises(TransportError, match=f"{address} did not answer for 0.5 s .it has not answered so far"):
                client.result.result(PATIENCE)
        over.set()


def test_the_maximum_wait_is_kept_when_a_server_freezes_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    thawed = threading.Event()
    real = FlowerEngine.pull

    def pull(engine: FlowerEngine, *request: Any) -> tuple[int, bytes]:
        thawed.wait(PATIENCE)
        return real(engine, *request)

    monkeypatch.setattr(FlowerEngine, "pull", pull)
    with EmbeddedServer(host="127.0.0.1", port=free_port(), tls=None) as server:
        transport = server.transport()
        with ThreadClient(server.address, "lyon", max_wait=1.0) as client:
            with pytest.raises(TransportError, match="did not answer for 1 s"):
                client.result.result(PATIENCE)
            thawed.set()
        transport.close("done")


def test_a_client_that_has_nothing_to_do_says_so() -> None:
    with EmbeddedServer(host="127.0.0.1", port=free_port(), tls=None) as server:
        transport = server.transport()
        with ThreadClient(server.address, "lyon") as client:
            joined(transport)
            line = client.says("waiting for work from the server (")
            assert "has nothing to do; the server's output, and 'fedshelf runs show' there" in line
            transport.close("done")
            assert client.result.result(PATIENCE).kind is EndKind.CLOSED


@pytest.mark.parametrize(("ahead", "told"), [(400 * 86400.0, "400 days ahead of"), (-1800.0, "30 min 0 s behind")])
def test_a_store_whose_clock_is_wrong_joins_by_the_servers_time_and_both_say_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ahead: float, told: str
) -> None:
    with EmbeddedServer(host="127.0.0.1", port=free_port(), tls=None) as server:
        transport = server.transport()
        with monkeypatch.context() as patch:
            patch.setattr(credentials, "time", Clock(ahead=ahead))
            with ThreadClient(server.address, "lyon") as client:
                assert "lyon" in joined(transport)
                assert "Set the one that is wrong" in client.says(f"this machine's clock is {told} the server's")
    (line,) = (record.getMessage() for record in caplog.records if "clock" in record.getMessage())
    assert line.startswith(f"lyon: its clock is {told} this server's")


@pytest.mark.parametrize("told", ["nan", "inf", "-1", "1e300", "noon", None])
def test_a_time_that_no_server_can_have_is_not_compared(answering: Callable[..., Answering], told: str | None) -> None:
    server = answering(200, json.dumps({"protocol": PROTOCOL_VERSION, "time": told}).encode())
    address = Address(host="127.0.0.1", port=server.server_port)
    with contextlib.closing(http_connection.HttpConnection(address, None, timeout=PATIENCE)) as connection:
        assert greeting.greet(connection, address, encrypted=False) is None


def test_a_difference_of_clocks_that_is_no_number_is_ignored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    headers = credentials.Signer.headers
    for told in ("nan", "1e999", "9" * 40, "--5", ""):
        monkeypatch.setattr(flower_client, "CLOCK_HEADER", "x-not-sent")
        with monkeypatch.context() as patch, EmbeddedServer(host="127.0.0.1", port=free_port(), tls=None) as server:
            transport = server.transport()
            patch.setattr(
                credentials.Signer,
                "headers",
                lambda *given, told=told: {**headers(*given), greeting.CLOCK_HEADER: told},
            )
            with ThreadClient(server.address, "lyon"):
                assert "lyon" in joined(transport)
    assert not [record for record in caplog.records if "clock" in record.getMessage()]


def test_answers_do_not_depend_on_the_clock_of_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedServer(host="127.0.0.1", port=free_port(), tls=None) as server:
        transport = server.transport()
        later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=400)

        def created_later(*arguments: Any, **more: Any) -> Message:
            """As on a machine whose clock is 400 days ahead."""
            with monkeypatch.context() as patch:
                patch.setattr("flwr.app.message.message.now", lambda: later)
                return Message(*arguments, **more)

        monkeypatch.setattr(registration, "Message", created_later)
        with ThreadClient(server.address, "lyon"):
            assert "lyon" in joined(transport)


class Clock:
    """This machine's clock, but wrong."""

    def __init__(self, *, ahead: float) -> None:
        self._ahead = ahead

    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return time.time() + self._ahead


@pytest.mark.parametrize(("start", "end", "problem"), [(-9, -1, "has expired"), (1, 9, "is not yet valid")])
def test_a_certificate_out_of_its_time_is_waited_for(tmp_path: Path, start: int, end: int, problem: str) -> None:
    tls, now, day = ensure_server_tls(tmp_path), datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    authority, key = read_certificate(tls.ca), read_key(tmp_path / "ca.key")
    issue(tls, authority, key, [x509.DNSName("localhost")], start=now + start * day, end=now + end * day)
    with EmbeddedServer(host="127.0.0.1", port=free_port(), tls=tls) as server:
        port = server.address.port
        client = ThreadClient(f"localhost:{port}", "lyon", insecure=False, ca=tls.ca)
        line = client.says(f"the certificate of localhost:{port} {problem}: it holds from ")
        assert f"and this machine's clock shows {now:%Y-%m-%d}" in line
    with client, EmbeddedServer(host="127.0.0.1", port=port, tls=ensure_server_tls(tmp_path)) as server:
        assert "lyon" in joined(server.transport())


def test_a_proxy_that_refuses_is_named_and_waited_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tls = ensure_server_tls(tmp_path)
    with connect_proxy(None, 403) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:secret@127.0.0.1:{proxy.port}")
        with ThreadClient("shop.example:8080", "lyon", insecure=False, ca=tls.ca) as client:
            client.says("(HTTPS_PROXY) does not connect to shop.example:8080: it answers 403")
    assert not any("secret" in status for status in client.statuses)


def test_a_client_joins_through_a_proxy_by_an_advertised_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tls = ensure_server_tls(tmp_path, ["shop.example"])
    with EmbeddedServer(host="127.0.0.1", port=free_port(), tls=tls) as server:
        transport = server.transport()
        with connect_proxy((server.address.host, server.address.port)) as proxy:
            monkeypatch.setenv("HTTPS_PROXY", proxy.url)
            with ThreadClient("shop.example:8080", "lyon", insecure=False, ca=tls.ca) as client:
                assert "lyon" in joined(transport)
                transport.close("done")
                assert client.result.result(PATIENCE).kind is EndKind.CLOSED


def test_an_answer_that_is_none_ends_the_registration_and_not_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine in between answers for the server."""
    real, odd = FlowerEngine.pull, [b"<html>maintenance</html>", b'{"message": "AAAA", "objects": {}}', b"[]"]

    def pull(engine: FlowerEngine, *request: Any) -> tuple[int, bytes]:
        return (200, odd.pop()) if odd else real(engine, *request)

    monkeypatch.setattr(FlowerEngine, "pull", pull)
    with EmbeddedServer(host="127.0.0.1", port=free_port(), tls=None) as server:
        transport = server.transport()
        with ThreadClient(server.address, "lyon") as client:
            assert "lyon" in joined(transport)
            assert not odd
            client.says("was lost (the server's answer cannot be read (")


@pytest.mark.parametrize("address", ["0.0.0.0:8080", "[::]:8080", "shop.example:0", "a..b:8080", f"{'a' * 70}:8080"])
def test_an_address_that_leads_nowhere_is_refused_at_once(address: str) -> None:
    with ThreadClient(address, "lyon") as client, pytest.raises(UsageError):
        client.result.result(PATIENCE)
    assert not client.statuses
