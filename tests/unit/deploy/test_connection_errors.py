"""What can go wrong on the way to a server: each is one sentence, and tells whether trying again may help.

Real sockets, real certificates, real proxies.
"""

import contextlib
import datetime
import http.server
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import pytest
from cryptography import x509

from fedshelf.core.errors import TransportError
from fedshelf.deploy import blob_client, flower_client
from fedshelf.deploy.address import Address
from fedshelf.deploy.connection_errors import ServerUnavailableError, SessionLostError
from fedshelf.deploy.http_connection import Answer, HttpConnection
from fedshelf.deploy.tls import (
    ServerTls,
    client_context,
    ensure_server_tls,
    issue,
    make_authority,
    read_certificate,
    read_key,
)
from tests.connect_proxy import connect_proxy

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
Span: TypeAlias = tuple[datetime.timedelta, datetime.timedelta]


class Hello(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    """Speaks TLS where it is given a certificate; keeps quiet about clients that do not trust it."""

    daemon_threads = True

    def __init__(self, tls: ServerTls | None) -> None:
        super().__init__(("127.0.0.1", 0), Hello)
        self._context = None
        if tls is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(tls.certificate, tls.key)

    def finish_request(self, request: object, client_address: object) -> None:
        assert isinstance(request, socket.socket)
        with contextlib.suppress(OSError):
            secure = self._context.wrap_socket(request, server_side=True) if self._context else request
            super().finish_request(secure, client_address)
            secure.close()

    @property
    def target(self) -> tuple[str, int]:
        return "127.0.0.1", self.server_port


@contextlib.contextmanager
def serving(tls: ServerTls | None) -> Iterator[Server]:
    with Server(tls) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def tls(tmp_path: Path) -> ServerTls:
    return ensure_server_tls(tmp_path / "tls", ["shop.example"])


def dated(folder: Path, *, ca: Span, own: Span) -> ServerTls:
    """Certificates that hold from and until so long after now."""
    folder.mkdir()
    tls = ServerTls(ca=folder / "ca.pem", certificate=folder / "server.pem", key=folder / "server.key")
    make_authority(tls.ca, folder / "ca.key", start=NOW + ca[0], end=NOW + ca[1])
    authority, key, names = read_certificate(tls.ca), read_key(folder / "ca.key"), [x509.DNSName("localhost")]
    issue(tls, authority, key, names, start=NOW + own[0], end=NOW + own[1])
    return tls


def get(address: Address, ca: Path | None) -> bytes:
    connection = HttpConnection(address, None if ca is None else client_context(ca), timeout=20)
    try:
        return connection.request("GET", "/", {}).content
    finally:
        connection.close()


def failure(address: Address, ca: Path | None) -> TransportError:
    """What comes instead of an answer; nothing of it is for programmers."""
    with pytest.raises(TransportError) as caught:
        get(address, ca)
    text = str(caught.value)
    assert "Errno" not in text
    assert "Error" not in text
    assert "_ssl.c" not in text
    return caught.value


def test_nobody_listens_and_trying_again_may_help() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    found = failure(Address(host="127.0.0.1", port=port), None)
    assert isinstance(found, ServerUnavailableError)
    assert str(found).startswith(f"cannot connect to the server at 127.0.0.1:{port}: connection refused; check that it")


def test_a_name_that_nobody_knows_is_repeated_with_what_to_check() -> None:
    found = failure(Address(host="shop.invalid", port=8080), None)
    assert isinstance(found, ServerUnavailableError)
    assert "cannot connect to the server at shop.invalid:8080: " in str(found)
    assert "check the spelling of shop.invalid" in str(found)


def test_an_address_that_the_system_does_not_take_is_no_traceback() -> None:
    found = failure(Address(host="fe80::1", port=8080), None)
    assert isinstance(found, ServerUnavailableError)
    assert "cannot connect to the server at [fe80::1]:8080: " in str(found)


def test_a_connection_that_is_closed_without_an_answer_is_broken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            listener.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        address = Address(host="127.0.0.1", port=listener.getsockname()[1])
        found = failure(address, None)
    assert isinstance(found, ServerUnavailableError)
    assert str(found).startswith(f"the connection to {address} broke: ")


def test_a_server_of_another_authority_is_not_trusted_and_what_to_ask_for_is_named(
    tls: ServerTls, tmp_path: Path
) -> None:
    with serving(tls) as server:
        found = failure(Address(host="localhost", port=server.server_port), ensure_server_tls(tmp_path / "other").ca)
    assert not isinstance(found, ServerUnavailableError)
    for part in ("another authority", "Ask headquarters", "a new token (--token)", "the server's ca.pem (--ca)"):
        assert part in str(found)


def test_a_name_that_the_certificate_lacks_is_to_be_advertised(tls: ServerTls) -> None:
    with serving(tls) as server, connect_proxy(server.target) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HTTPS_PROXY", proxy.url)
        assert get(Address(host="shop.example", port=8080), tls.ca) == b"hello"
        found = failure(Address(host="store.example", port=8080), tls.ca)
    assert not isinstance(found, ServerUnavailableError)
    assert "is not made out to store.example" in str(found)
    assert "--advertise store.example:8080" in str(found)


@pytest.mark.parametrize(
    ("ca", "own", "said"),
    [
        ((-9 * DAY, 9 * DAY), (-9 * DAY, -DAY), "the certificate of localhost:{} has expired: it holds from"),
        ((-9 * DAY, 9 * DAY), (DAY, 9 * DAY), "the certificate of localhost:{} is not yet valid: it holds from"),
        ((-9 * DAY, -DAY), (-9 * DAY, 9 * DAY), "the certificate authority of localhost:{} has expired: it holds from"),
        ((DAY, 9 * DAY), (-9 * DAY, 9 * DAY), "the certificate authority of localhost:{} is not yet valid"),
    ],
    ids=["expired", "not yet valid", "authority expired", "authority not yet valid"],
)
def test_a_certificate_out_of_its_time_is_told_with_its_dates_and_the_clock_and_time_may_heal_it(
    tmp_path: Path,
    ca: Span,
    own: Span,
    said: str,
) -> None:
    tls = dated(tmp_path / "tls", ca=ca, own=own)
    with serving(tls) as server:
        found = failure(Address(host="localhost", port=server.server_port), tls.ca)
        expected = said.format(server.server_port)
    assert isinstance(found, ServerUnavailableError)
    text = str(found)
    assert expected in text
    start, end = ca if "authority" in said else own
    for date in (NOW + start, NOW + end, datetime.datetime.now(datetime.UTC)):
        assert f"{date:%Y-%m-%d}" in text
    assert "Set this machine's clock if it is wrong" in text


def test_a_server_that_does_not_encrypt_is_told_from_one_that_is_not_there(tls: ServerTls) -> None:
    with serving(None) as server:
        found = failure(Address(host="localhost", port=server.server_port), tls.ca)
    assert not isinstance(found, ServerUnavailableError)
    assert "does not encrypt" in str(found)


def test_a_server_that_encrypts_is_known_from_outside(tls: ServerTls) -> None:
    for certificates in (tls, None):
        with serving(certificates) as server:
            connection = HttpConnection(Address(host="localhost", port=server.server_port), None, timeout=20)
            assert connection.speaks_tls() is (certificates is not None)


def test_a_proxy_leads_to_the_server_and_is_told_its_name_and_the_password(
    tls: ServerTls, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tls) as server, connect_proxy(server.target) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:s%40me@127.0.0.1:{proxy.port}")
        assert get(Address(host="shop.example", port=8080), tls.ca) == b"hello"
        (asked,) = proxy.asked
    assert asked.startswith("CONNECT shop.example:8080 HTTP/1.1\r\nHost: shop.example:8080\r\n")
    assert "Proxy-Authorization: Basic bWU6c0BtZQ==\r\n" in asked


@pytest.mark.parametrize(("host", "target"), [("2001:db8::7", "[2001:db8::7]:8080"),
                                              ("münchen.example", "xn--mnchen-3ya.example:8080")])  # fmt: skip
def test_a_proxy_is_asked_for_addresses_as_the_standard_writes_them(
    monkeypatch: pytest.MonkeyPatch, host: str, target: str
) -> None:
    with serving(None) as server, connect_proxy(server.target) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert get(Address(host=host, port=8080), None) == b"hello"
        assert proxy.asked[0].startswith(f"CONNECT {target} HTTP/1.1\r\n")


def test_a_server_on_this_machine_is_reached_past_the_proxy(tls: ServerTls, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tls) as server, connect_proxy(None, 403) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        assert get(Address(host="127.0.0.1", port=server.server_port), tls.ca) == b"hello"
        assert not proxy.asked


@pytest.mark.parametrize(
    ("status", "may_pass", "said"),
    [
        (
            403,
            False,
            "it answers 403 Forbidden; have it allow CONNECT to shop.example:8080, or list shop.example in NO",
        ),
        (407, False, "it answers 407 Proxy Authentication Required; put a user and password"),
        (405, False, "it answers 405 Method Not Allowed; have it allow CONNECT"),
        (502, True, "it answers 502 Bad Gateway; check that the server runs"),
        (504, True, "it answers 504 Gateway Timeout; check that the server runs"),
        (599, True, "it answers 599; check that the server runs"),
    ],
)
def test_a_proxy_that_refuses_is_named_with_what_it_says(
    monkeypatch: pytest.MonkeyPatch, status: int, may_pass: bool, said: str
) -> None:
    with connect_proxy(None, status) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://me:secret@127.0.0.1:{proxy.port}")
        found = failure(Address(host="shop.example", port=8080), None)
    assert isinstance(found, ServerUnavailableError) is may_pass
    assert f"the proxy 127.0.0.1:{proxy.port} (HTTP_PROXY) does not connect to shop.example:8080: {said}" in str(found)
    assert "secret" not in str(found)


def test_a_proxy_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
    found = failure(Address(host="shop.example", port=8080), None)
    assert isinstance(found, ServerUnavailableError)
    assert str(found).startswith(f"cannot connect to the proxy (HTTP_PROXY) at 127.0.0.1:{port}: connection refused;")


def test_a_program_that_is_no_proxy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with listener.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        threading.Thread(target=answer, daemon=True).start()
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{listener.getsockname()[1]}")
        found = failure(Address(host="shop.example", port=8080), None)
    assert "(HTTP_PROXY) does not connect to shop.example:8080: the answer is not HTTP" in str(found)
    assert "names an HTTP proxy" in str(found)


def test_a_proxy_that_opens_the_encryption_is_suspected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, inspecting = ensure_server_tls(tmp_path / "own"), ensure_server_tls(tmp_path / "proxy", ["shop.example"])
    with serving(inspecting) as server, connect_proxy(server.target) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        found = failure(Address(host="shop.example", port=8080), own.ca)
    assert f"or the proxy 127.0.0.1:{proxy.port} (HTTPS_PROXY) opens the encryption" in str(found)


def test_after_a_restart_a_client_says_that_it_joins_again_by_itself() -> None:
    told = "the server was restarted and no longer knows this session. This client joins again by itself"
    answer = Answer(status=401, headers={}, content=b'{"detail": "unknown session"}')
    for check in (lambda: flower_client._checked(answer), lambda: blob_client._check(401, 200)):
        with pytest.raises(SessionLostError) as raised:
            check()
        assert str(raised.value) == told
