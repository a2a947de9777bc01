"""The server's own certificate authority and certificate: encryption that works from the first start.

The authority is kept for ten years, so that a store gets its certificate (``ca.pem``) once; the server's
certificate is made anew whenever it lacks a name or nears its end.
"""

import datetime
import ipaddress
import os
import socket
import ssl
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedshelf.config.places import tls_directory
from fedshelf.core.errors import TransportError

CA_LIFETIME = datetime.timedelta(days=3650)
CERTIFICATE_LIFETIME = datetime.timedelta(days=825)
RENEW_BEFORE = datetime.timedelta(days=30)
CLOCK_SKEW = datetime.timedelta(days=1)
WILDCARDS = frozenset({"", "0.0.0.0", "::"})  # noqa: S104 addresses to listen on are not names to be called by


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerTls:
    """Paths of PEM files: the authority's certificate (to hand out), the server's certificate and its key."""

    ca: Path
    certificate: Path
    key: Path


def ensure_server_tls(directory: Path, hosts: Iterable[str] = ()) -> ServerTls:
    """Make or reuse the authority and the server's certificate in `directory`.

    Args:
        directory: created with mode 0700; keys in it have mode 0600.
        hosts: names and addresses that clients use for this server, beside those of this machine.

    Raises:
        TransportError: the directory cannot be written, or holds files that are not ours.
    """
    tls = ServerTls(ca=directory / "ca.pem", certificate=directory / "server.pem", key=directory / "server.key")
    ca_key_path = directory / "ca.key"
    names = _names(hosts)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        if not (tls.ca.exists() and ca_key_path.exists()):
            _write_authority(tls.ca, ca_key_path)
        ca, ca_key = _read_certificate(tls.ca), _read_key(ca_key_path)
        if not _is_usable(tls, ca, names):
            _write_certificate(tls, ca, ca_key, names)
    except (OSError, ValueError, TypeError) as error:
        raise TransportError(
            f"the server's certificates in {directory} cannot be used ({error}); move that directory away, and "
            "new ones are made (clients elsewhere then need the new ca.pem), or start with --insecure"
        ) from error
    return tls


def fingerprint(certificate: Path) -> str:
    """SHA-256 of a PEM certificate in the usual notation (AB:CD:…), for people to compare."""
    return _read_certificate(certificate).fingerprint(hashes.SHA256()).hex(":").upper()


def client_context(ca: Path | None) -> ssl.SSLContext:
    """What a client checks the server against: `ca` alone; without one, this machine's own server and the system's
    authorities.

    Raises:
        TransportError: `ca` is not there or holds no certificate.
    """
    if ca is not None:
        try:
            return ssl.create_default_context(cafile=str(ca))
        except (OSError, ssl.SSLError) as error:
            raise TransportError(
                f"--ca {ca}: {error.strerror or error}; give the ca.pem that 'fedshelf server' made"
            ) from error
    context = ssl.create_default_context()
    local = local_authority()
    if local:
        context.load_verify_locations(cadata=local)
    return context


def local_authority() -> str:
    """The certificate (PEM) of this machine's own authority; empty before a server has made one."""
    try:
        return (tls_directory() / "ca.pem").read_text(encoding="ascii")
    except FileNotFoundError:
        return ""


def _names(hosts: Iterable[str]) -> list[str]:
    machine = ["localhost", "127.0.0.1", "::1", socket.gethostname(), *_own_addresses()]
    return list(dict.fromkeys(name for name in (*machine, *hosts) if name not in WILDCARDS))


def _own_addresses() -> list[str]:
    """This machine's IP addresses: people type one of them where there is no name service."""
    entries = [entry for interface in psutil.net_if_addrs().values() for entry in interface]
    found = {entry.address for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)}
    return sorted(address for address in found if "%" not in address)  # a scope is this machine's own affair


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name.encode("idna").decode("ascii"))


def _is_usable(tls: ServerTls, ca: x509.Certificate, names: list[str]) -> bool:
    if not (tls.certificate.exists() and tls.key.exists()):
        return False
    certificate = _read_certificate(tls.certificate)
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    if certificate.public_key() != _read_key(tls.key).public_key():
        return False  # stopped between the two writes
    held = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return certificate.not_valid_after_utc - _now() > RENEW_BEFORE and all(_general_name(n) in held for n in names)


def _write_authority(certificate_path: Path, key_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _subject(f"FedShelf authority of {socket.gethostname()}")
    usage = _key_usage(signs_certificates=True)
    certificate = (
        _builder(subject=name, issuer=name, public_key=key.public_key(), lifetime=CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    _write_key(key_path, key)
    _write_atomic(certificate_path, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)


def _write_certificate(
    tls: ServerTls, ca: x509.Certificate, ca_key: ec.EllipticCurvePrivateKey, names: list[str]
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject(f"FedShelf server {socket.gethostname()}")
    issuer_id = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(subject=subject, issuer=ca.subject, public_key=key.public_key(), lifetime=CERTIFICATE_LIFETIME)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    _write_key(tls.key, key)
    _write_atomic(tls.certificate, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)


def _builder(
    *, subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, lifetime: datetime.timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - CLOCK_SKEW)
        .not_valid_after(_now() + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _subject(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _read_certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path.name} is not an elliptic-curve key")
    return key


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    _write_atomic(path, key.private_bytes(encoding, form, serialization.NoEncryption()), mode=0o600)


def _write_atomic(path: Path, content: bytes, *, mode: int) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(mode)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
