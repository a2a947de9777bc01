"""The server's own certificate authority and certificate."""

import datetime
import socket
import ssl
import threading
from pathlib import Path

import psutil
import pytest

from fedshelf.config.places import tls_directory
from fedshelf.core.errors import TransportError
from fedshelf.deploy import tls
from fedshelf.deploy.tls import ServerTls, client_context, ensure_server_tls, fingerprint


def shake_hands(server: ServerTls, client: ssl.SSLContext, name: str) -> None:
    """A TLS handshake over loopback, the client expecting `name`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.certificate, server.key)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        try:
            with context.wrap_socket(connection, server_side=True) as secure:
                secure.recv(1)
        except OSError:
            connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with (
            socket.create_connection(listener.getsockname()) as raw,
            client.wrap_socket(raw, server_hostname=name) as secure,
        ):
            secure.send(b"x")
    finally:
        thread.join()
        listener.close()


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1", "shop.example", "10.1.2.3", socket.gethostname()])
def test_clients_with_the_authority_trust_the_server_under_all_its_names(tmp_path: Path, name: str) -> None:
    server = ensure_server_tls(tmp_path / "tls", ["shop.example", "10.1.2.3", "0.0.0.0"])
    shake_hands(server, client_context(server.ca), name)


def test_a_client_with_another_authority_does_not_trust_the_server(tmp_path: Path) -> None:
    server, other = ensure_server_tls(tmp_path / "a"), ensure_server_tls(tmp_path / "b")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server, client_context(other.ca), "localhost")


def test_a_name_that_the_certificate_lacks_is_not_trusted(tmp_path: Path) -> None:
    server = ensure_server_tls(tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server, client_context(server.ca), "shop.example")


def test_clients_reach_the_server_under_each_of_its_addresses(tmp_path: Path) -> None:
    server = ensure_server_tls(tmp_path)
    own = [e.address for interface in psutil.net_if_addrs().values() for e in interface if e.family == socket.AF_INET]
    assert own
    for address in own:
        shake_hands(server, client_context(server.ca), address)


def test_nobody_else_can_read_the_keys(tmp_path: Path) -> None:
    server = ensure_server_tls(tmp_path / "tls")
    assert (tmp_path / "tls").stat().st_mode & 0o777 == 0o700
    assert server.key.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "tls" / "ca.key").stat().st_mode & 0o777 == 0o600


def test_a_second_start_changes_nothing(tmp_path: Path) -> None:
    server = ensure_server_tls(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert ensure_server_tls(tmp_path) == server
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_missing_name_makes_a_new_certificate_of_the_same_authority(tmp_path: Path) -> None:
    server = ensure_server_tls(tmp_path)
    old = fingerprint(server.certificate), fingerprint(server.ca)
    ensure_server_tls(tmp_path, ["shop.example"])
    assert fingerprint(server.certificate) != old[0]
    assert fingerprint(server.ca) == old[1]
    shake_hands(server, client_context(server.ca), "shop.example")


def test_a_certificate_near_its_end_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "CERTIFICATE_LIFETIME", datetime.timedelta(days=29))
    server = ensure_server_tls(tmp_path)
    old = fingerprint(server.certificate), fingerprint(server.ca)
    monkeypatch.undo()
    ensure_server_tls(tmp_path)
    assert fingerprint(server.certificate) != old[0]
    assert fingerprint(server.ca) == old[1]


def test_a_key_that_does_not_fit_its_certificate_is_replaced(tmp_path: Path) -> None:
    server = ensure_server_tls(tmp_path / "a")
    server.key.write_bytes(ensure_server_tls(tmp_path / "b").key.read_bytes())
    shake_hands(ensure_server_tls(tmp_path / "a"), client_context(server.ca), "localhost")


def test_files_that_are_not_ours_are_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("not a certificate")
    (tmp_path / "ca.key").write_text("not a key")
    with pytest.raises(TransportError, match="move that directory away"):
        ensure_server_tls(tmp_path)


@pytest.mark.parametrize("content", [None, "not a certificate"])
def test_a_bad_ca_file_is_one_clear_error(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TransportError, match=r"--ca .*ca\.pem"):
        client_context(path)


def test_a_client_on_the_same_machine_finds_the_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSHELF_HOME", str(tmp_path))
    server = ensure_server_tls(tls_directory())
    assert server.ca.is_relative_to(tmp_path)
    shake_hands(server, client_context(None), "localhost")


def test_fingerprints_are_written_for_people_to_compare(tmp_path: Path) -> None:
    text = fingerprint(ensure_server_tls(tmp_path).ca)
    assert len(text.split(":")) == 32
    assert text == text.upper()
