"""The server's own certificate authority and certificate, made at the right time and at wrong ones."""

import datetime
import socket
import ssl
import threading
from pathlib import Path

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedshelf.config.places import tls_directory
from fedshelf.core.errors import IdentityError, TransportError, UsageError
from fedshelf.deploy import tls
from fedshelf.deploy.tls import (
    CERTIFICATE_LIFETIME,
    ServerTls,
    client_context,
    ensure_server_tls,
    fingerprint,
    issue,
    make_authority,
    own_server_tls,
    read_certificate,
    read_key,
)
from tests.other_user import error_as_other_user

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
    before = contents(tmp_path)
    assert ensure_server_tls(tmp_path) == server
    assert contents(tmp_path) == before


def test_a_missing_name_makes_a_new_certificate_of_the_same_authority(tmp_path: Path) -> None:
    server = ensure_server_tls(tmp_path)
    old = fingerprint(server.certificate), fingerprint(server.ca)
    ensure_server_tls(tmp_path, ["shop.example"])
    assert fingerprint(server.certificate) != old[0]
    assert fingerprint(server.ca) == old[1]
    shake_hands(server, client_context(server.ca), "shop.example")


@pytest.mark.parametrize("days", [-100, -65, 65, 100])
def test_a_certificate_of_another_time_is_made_anew_by_the_same_authority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    """Its end is near or past; or it was made while the clock was ahead, which leaves it as it is."""
    monkeypatch.setattr(tls, "VALID_FROM", NOW - 1000 * DAY)
    server = ensure_server_tls(tmp_path, now=NOW + days * DAY)
    old = fingerprint(server.certificate), fingerprint(server.ca)
    ensure_server_tls(tmp_path)
    assert (fingerprint(server.certificate) != old[0]) is (days < 0)
    assert fingerprint(server.ca) == old[1]
    shake_hands(server, client_context(server.ca), "localhost")


@pytest.mark.parametrize(("start", "end"), [(-9, -1), (1, 9), (-9, 20)])
def test_a_certificate_that_does_not_hold_is_made_anew(tmp_path: Path, start: int, end: int) -> None:
    server = ensure_server_tls(tmp_path)
    authority, key = read_certificate(server.ca), read_key(tmp_path / "ca.key")
    names = [x509.DNSName("localhost")]
    issue(server, authority, key, names, start=NOW + start * DAY, end=NOW + end * DAY)
    shake_hands(ensure_server_tls(tmp_path), client_context(server.ca), "localhost")


@pytest.mark.parametrize(
    ("start", "end", "said"),
    [(-9, -1, "has expired: it holds from"), (1, 9, "is not yet valid: it holds from")],
)
def test_an_authority_that_does_not_hold_is_told_and_never_replaced(
    tmp_path: Path, start: int, end: int, said: str
) -> None:
    make_authority(tmp_path / "ca.pem", tmp_path / "ca.key", start=NOW + start * DAY, end=NOW + end * DAY)
    before = contents(tmp_path)
    with pytest.raises(TransportError, match=said) as caught:
        ensure_server_tls(tmp_path)
    for part in (f"{NOW + start * DAY:%Y-%m-%d}", f"{NOW + end * DAY:%Y-%m-%d}", f"clock shows {NOW:%Y-%m-%d}",
                 "Set the clock if it is wrong", f"mv {tmp_path} {tmp_path}.old"):  # fmt: skip
        assert part in str(caught.value)
    assert contents(tmp_path) == before


def test_an_authority_made_while_the_clock_was_ahead_holds_when_it_is_right(tmp_path: Path) -> None:
    server = ensure_server_tls(tmp_path, now=NOW + 500 * DAY)
    shake_hands(ensure_server_tls(tmp_path), client_context(server.ca), "localhost")


@pytest.mark.parametrize("year", [1970, 1995, 2024])
def test_a_clock_before_any_fedshelf_makes_no_certificates(tmp_path: Path, year: int) -> None:
    with pytest.raises(TransportError, match=f"this machine's clock shows {year}-01-02 .* set it"):
        ensure_server_tls(tmp_path / "tls", now=datetime.datetime(year, 1, 2, tzinfo=datetime.UTC))
    assert not (tmp_path / "tls").exists()


def test_an_authority_is_renewed_a_year_before_its_end_with_the_same_key(tmp_path: Path) -> None:
    make_authority(tmp_path / "ca.pem", tmp_path / "ca.key", start=NOW - DAY, end=NOW + 400 * DAY)
    old = (tmp_path / "ca.pem").read_bytes()
    server = ensure_server_tls(tmp_path)
    assert server.ca.read_bytes() == old
    make_authority(tmp_path / "ca.pem", tmp_path / "ca.key", start=NOW - DAY, end=NOW + 300 * DAY)
    copied = tmp_path / "copied.pem"
    copied.write_bytes((tmp_path / "ca.pem").read_bytes())
    server = ensure_server_tls(tmp_path)
    assert read_certificate(server.ca).not_valid_after_utc > NOW + 1000 * DAY
    shake_hands(server, client_context(server.ca), "localhost")
    shake_hands(server, client_context(copied), "localhost")  # a store that has the old one goes on


def test_the_authoritys_key_may_be_elsewhere_until_a_certificate_is_due(tmp_path: Path) -> None:
    server = ensure_server_tls(tmp_path)
    (tmp_path / "ca.key").rename(tmp_path / "in a safe")
    said: list[str] = []
    shake_hands(ensure_server_tls(tmp_path, say=said.append), client_context(server.ca), "localhost")
    assert said == []
    ensure_server_tls(tmp_path, now=NOW + 70 * DAY, say=said.append)
    (line,) = said
    assert f"ends on {NOW + CERTIFICATE_LIFETIME:%Y-%m-%d}" in line
    with pytest.raises(TransportError, match=r"ca\.key' is missing, and the server needs a new certificate"):
        ensure_server_tls(tmp_path, now=NOW + 100 * DAY)


def test_a_passphrase_protects_the_authoritys_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSHELF_PASSPHRASE", "correct horse")
    server = ensure_server_tls(tmp_path)
    assert b"ENCRYPTED" in (tmp_path / "ca.key").read_bytes()
    shake_hands(ensure_server_tls(tmp_path, ["shop.example"]), client_context(server.ca), "shop.example")
    monkeypatch.delenv("FEDSHELF_PASSPHRASE")
    with pytest.raises(IdentityError, match="is encrypted: set FEDSHELF_PASSPHRASE"):
        ensure_server_tls(tmp_path)


def test_a_certificate_from_elsewhere_can_be_used(tmp_path: Path) -> None:
    made = ensure_server_tls(tmp_path)
    server = own_server_tls(made.certificate, made.key)
    shake_hands(server, client_context(made.ca), "localhost")
    with pytest.raises(TransportError, match=r"give a certificate \(PEM\) and the key that belongs to it"):
        own_server_tls(made.certificate, tmp_path / "ca.key")


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (["ca.pem"], r"ca\.pem' is missing, .*copy it back from a backup or from any store"),
        (["ca.pem", "server.pem"], r"ca\.pem' is missing"),
        (["ca.pem", "ca.key"], r"ca\.pem' is missing"),
        (["ca.key", "server.key", "server.pem"], r"ca\.key' is missing"),
    ],
)
def test_an_authority_that_is_not_whole_is_never_replaced(tmp_path: Path, lost: list[str], said: str) -> None:
    ensure_server_tls(tmp_path)
    for name in lost:
        (tmp_path / name).unlink()
    before = contents(tmp_path)
    with pytest.raises(TransportError, match=said):
        ensure_server_tls(tmp_path)
    assert contents(tmp_path) == before


def test_a_first_start_that_was_cut_off_is_no_obstacle(tmp_path: Path) -> None:
    server = ensure_server_tls(tmp_path)
    for name in ("ca.pem", "server.pem", "server.key"):  # the authority's key is written first
        (tmp_path / name).unlink()
    shake_hands(ensure_server_tls(tmp_path), client_context(server.ca), "localhost")


def test_a_certificate_and_key_that_are_lost_are_made_anew(tmp_path: Path) -> None:
    server = ensure_server_tls(tmp_path)
    authority = fingerprint(server.ca)
    server.certificate.write_text("damaged")
    server.key.unlink()
    shake_hands(ensure_server_tls(tmp_path), client_context(server.ca), "localhost")
    assert fingerprint(server.ca) == authority


def test_the_key_of_another_authority_signs_nothing(tmp_path: Path) -> None:
    ensure_server_tls(tmp_path / "a")
    ensure_server_tls(tmp_path / "b")
    (tmp_path / "a" / "ca.key").write_bytes((tmp_path / "b" / "ca.key").read_bytes())
    with pytest.raises(TransportError, match=r"ca\.key' is not the key of '.*ca\.pem': restore both"):
        ensure_server_tls(tmp_path / "a", ["shop.example"])


@pytest.mark.parametrize("host", ["a" * 64, f"{'a' * 64}.example", "a..b", "tab\tname", "na\udce9me", "(none)", ""])
def test_a_machine_may_be_called_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """What cannot stand in a certificate is left out of it, and that is said."""
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    said: list[str] = []
    server = ensure_server_tls(tmp_path, ["shop.example"], say=said.append)
    for name in ("shop.example", "localhost"):
        shake_hands(server, client_context(server.ca), name)
    assert [f"the name {host!r} is left out of the server's certificate" in line for line in said] == (
        [] if host in ("(none)", "") else [True]
    )
    assert ensure_server_tls(tmp_path, ["shop.example"], say=said.append) == server


@pytest.mark.parametrize("host", ["a" * 63, "b" * 30 + "." + "c" * 34, "münchen"])
def test_a_long_name_that_is_allowed_stands_in_the_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    said: list[str] = []
    server = ensure_server_tls(tmp_path, say=said.append)
    shake_hands(server, client_context(server.ca), host)
    assert not said


def test_a_key_that_does_not_fit_its_certificate_is_replaced(tmp_path: Path) -> None:
    server = ensure_server_tls(tmp_path / "a")
    server.key.write_bytes(ensure_server_tls(tmp_path / "b").key.read_bytes())
    shake_hands(ensure_server_tls(tmp_path / "a"), client_context(server.ca), "localhost")


def test_files_that_are_not_ours_are_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("not a certificate")
    (tmp_path / "ca.key").write_text("not a key")
    with pytest.raises(TransportError, match=r"damaged or not FedShelf's .* move the folder away"):
        ensure_server_tls(tmp_path)


def test_an_authority_from_elsewhere_that_lacks_what_is_needed_is_one_clear_error(tmp_path: Path) -> None:
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(NOW - DAY).not_valid_after(NOW + 999 * DAY)
    encoding = serialization.Encoding.PEM
    (tmp_path / "ca.pem").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(encoding))
    form, secret = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (tmp_path / "ca.key").write_bytes(key.private_bytes(encoding, form, secret))
    with pytest.raises(TransportError, match="damaged or not FedShelf's"):
        ensure_server_tls(tmp_path)


def test_the_certificates_of_another_user_are_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSHELF_HOME", str(tmp_path / "home"))
    ensure_server_tls(tls_directory())
    tls_directory().chmod(0)  # for those who run these tests without root's rights
    serve = error_as_other_user(lambda: ensure_server_tls(tls_directory()))
    trust = error_as_other_user(lambda: client_context(None))
    give = error_as_other_user(lambda: client_context(tls_directory() / "ca.pem"))
    tls_directory().chmod(0o700)
    assert f"certificates in '{tls_directory()}' cannot be used by user" in serve
    assert "permission denied" in serve
    assert "set FEDSHELF_HOME" in serve
    assert f"cannot read '{tls_directory()}/ca.pem' (permission denied)" in trust
    assert "--ca FILE" in trust
    assert give.startswith(f"--ca {tls_directory()}/ca.pem: user ")


@pytest.mark.parametrize("content", ["not a certificate", "\xe9", "-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_a_damaged_authority_of_this_machine_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setenv("FEDSHELF_HOME", str(tmp_path))
    tls_directory().mkdir()
    (tls_directory() / "ca.pem").write_text(content, encoding="latin-1")
    with pytest.raises(UsageError, match=r"ca\.pem' does not hold a certificate: .*--ca FILE"):
        client_context(None)


def test_a_key_log_that_cannot_be_written_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", "/proc/absent/keys")
    ca = ensure_server_tls(tmp_path).ca
    with pytest.raises(UsageError, match="TLS cannot be set up: '/proc/absent/keys': no such file"):
        client_context(ca)


@pytest.mark.parametrize("content", [None, "not a certificate"])
def test_a_bad_ca_file_is_one_clear_error(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=r"--ca .*ca\.pem"):
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
