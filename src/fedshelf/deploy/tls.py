"""The server's own certificate authority and certificate, so that encryption works from the first start.

The authority is valid for ten years, so a store needs its certificate (``ca.pem``) only once. The server's certificate
is reissued when it lacks a name or is about to expire. The authority is never replaced, because that would lock out
every store. Both are valid from a fixed date in the past, so that a fast server clock does no harm.
"""

import contextlib
import datetime
import logging
import shlex
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedshelf.config.places import HOME_VARIABLE, tls_directory
from fedshelf.core.errors import TransportError
from fedshelf.core.system_errors import current_user, reason, user_name
from fedshelf.deploy.address import Address, host_problem, own_addresses, parse_ip
from fedshelf.deploy.connection_errors import validity
from fedshelf.storage.atomic_files import disk_advice, write_atomically

logger = logging.getLogger(__name__)

VALID_FROM = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)  # before FedShelf existed: an earlier clock is wrong
CA_LIFETIME = datetime.timedelta(days=3650)
CERTIFICATE_LIFETIME = datetime.timedelta(days=825)
RENEW_BEFORE = datetime.timedelta(days=30)
WARN_BEFORE = datetime.timedelta(days=90)  # before the authority expires: every store needs the next one
MAX_COMMON_NAME = 64
UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm, x509.ExtensionNotFound, x509.DuplicateExtension)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerTls:
    """A server's PEM files.

    Attributes:
        ca: the authority's certificate, to distribute.
        certificate: the server's certificate.
        key: the server's key.
    """

    ca: Path
    certificate: Path
    key: Path


def ensure_server_tls(
    directory: Path,
    hosts: Iterable[str] = (),
    *,
    now: datetime.datetime | None = None,
    say: Callable[[str], None] = logger.warning,
) -> ServerTls:
    """Create or reuse the authority and the server's certificate in `directory`.

    Args:
        directory: created with mode 0700; keys in it have mode 0600.
        hosts: names and addresses that clients use for this server, besides those of this machine.
        now: the current time; defaults to this machine's clock.
        say: receives warnings, for example about an omitted name or an authority that expires soon.

    Returns:
        The files, all currently valid.

    Raises:
        TransportError: the directory cannot be used, the clock is wrong, or the authority is expired or incomplete; the
            message explains how to restore it or start over.
    """
    now = now or datetime.datetime.now(datetime.UTC)
    if now < VALID_FROM:
        raise TransportError(
            f"this machine's clock shows {now:%Y-%m-%d %H:%M} UTC, which is wrong, and certificates go by it: set it, "
            "and start the server again"
        )
    tls = ServerTls(ca=directory / "ca.pem", certificate=directory / "server.pem", key=directory / "server.key")
    names = _names(hosts, say)
    with _saying_what_to_do(directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        ca, ca_key = _authority(tls, directory / "ca.key", now)
        if ca.not_valid_after_utc - now < WARN_BEFORE:
            say(f"the certificate authority ends on {ca.not_valid_after_utc:%Y-%m-%d}: {_start_anew(directory)}")
        if not _is_usable(tls, ca, names, now):
            issue(tls, ca, ca_key, names, end=min(now + CERTIFICATE_LIFETIME, ca.not_valid_after_utc))
    return tls


def fingerprint(certificate: Path) -> str:
    """Return the SHA-256 fingerprint of a PEM certificate (AB:CD:…), for people to compare."""
    return read_certificate(certificate).fingerprint(hashes.SHA256()).hex(":").upper()


def client_context(ca: Path | None) -> ssl.SSLContext:
    """Create the TLS settings that a client checks the server against.

    Args:
        ca: the only authority to trust, a file created by `fedshelf server`; None trusts this machine's own server and
            the system's authorities.

    Returns:
        The TLS settings.

    Raises:
        TransportError: the file cannot be read or does not contain a certificate.
    """
    try:
        if ca is not None:
            return ssl.create_default_context(cafile=str(ca))
        context = ssl.create_default_context()
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.filename:  # not about the authority: see SSLKEYLOGFILE
            raise TransportError(f"TLS cannot be set up: '{error.filename}': {reason(error)}") from error
        why = (
            "it does not hold a certificate"
            if isinstance(error, ssl.SSLError)
            else f"{current_user()}: {reason(error)}"
        )
        raise TransportError(
            f"--ca {ca}: {why}; give a copy of the ca.pem that 'fedshelf server' names when it starts"
        ) from error
    local = local_authority()
    if local:
        try:
            context.load_verify_locations(cadata=local)
        except (OSError, ValueError, TypeError) as error:
            raise TransportError(
                f"'{tls_directory() / 'ca.pem'}' does not hold a certificate: give the server's ca.pem with --ca FILE"
            ) from error
    return context


def local_authority() -> str:
    """Return the certificate (PEM) of this machine's own authority; empty if no server has created one.

    Raises:
        TransportError: this user may not read it.
    """
    path = tls_directory() / "ca.pem"
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise TransportError(
            f"{current_user()} cannot read '{path}' ({reason(error)}), the authority of a server on this machine: give "
            f"a copy with --ca FILE, or set {HOME_VARIABLE} to a folder of this user's own"
        ) from error


def make_authority(path: Path, key_path: Path, *, start: datetime.datetime, end: datetime.datetime) -> None:
    """Create a certificate authority.

    Args:
        path: where to write its certificate.
        key_path: where to write its key, which is written first.
        start: start of its validity.
        end: end of its validity.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = _subject("FedShelf authority", " of ")
    certificate = (
        _builder(subject=name, issuer=name, public_key=key.public_key(), start=start, end=end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write_key(key_path, key)
    write_atomically(path, certificate.public_bytes(serialization.Encoding.PEM))


def issue(
    tls: ServerTls,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    names: Iterable[x509.GeneralName],
    *,
    end: datetime.datetime,
    start: datetime.datetime | None = None,
) -> None:
    """Create the server's certificate and key.

    Args:
        tls: where to write them.
        ca: the authority's certificate.
        ca_key: the authority's key.
        names: the names that clients use for the server.
        end: end of validity.
        start: start of validity; defaults to that of the authority.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    issuer_id = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(
            subject=_subject("FedShelf server", " "), issuer=ca.subject, public_key=key.public_key(),
            start=start or ca.not_valid_before_utc, end=end,
        )
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id), critical=False)
        .sign(ca_key, hashes.SHA256())
    )  # fmt: skip
    _write_key(tls.key, key)
    write_atomically(tls.certificate, certificate.public_bytes(serialization.Encoding.PEM))


def _authority(
    tls: ServerTls, key_path: Path, now: datetime.datetime
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Load the authority, or create one if none ever existed."""
    directory = tls.ca.parent
    has_certificate, has_key = tls.ca.exists(), key_path.exists()
    if not (has_certificate or tls.certificate.exists() or tls.key.exists()):  # at most a first start was interrupted
        make_authority(tls.ca, key_path, start=VALID_FROM, end=now + CA_LIFETIME)
    elif not has_certificate:
        raise TransportError(
            f"'{tls.ca}' is missing, but '{directory}' was in use: copy it back from a backup or from any store, which "
            f"has the same file; or {_start_anew(directory)}"
        )
    elif not has_key:
        raise TransportError(
            f"'{key_path}' is missing, and without it the authority in '{tls.ca}' can make no certificate: restore it "
            f"from a backup; or {_start_anew(directory)}"
        )
    ca, ca_key = read_certificate(tls.ca), read_key(key_path)
    if ca.public_key() != ca_key.public_key():
        raise TransportError(
            f"'{key_path}' is not the key of '{tls.ca}': restore both from the same backup; or {_start_anew(directory)}"
        )
    if problem := validity(ca, now):
        raise TransportError(
            f"the certificate authority in '{tls.ca}' {problem}. Set the clock if it is wrong; else "
            f"{_start_anew(directory)}"
        )
    return ca, ca_key


def _start_anew(directory: Path) -> str:
    folder = shlex.quote(str(directory))
    return (
        f"start anew: stop the server, move the folder away (mv {folder} {shlex.quote(f'{directory}.old')}), start the "
        "server, and give every store a copy of the new ca.pem"
    )


@contextlib.contextmanager
def _saying_what_to_do(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if advice := disk_advice(error):
            raise TransportError(f"cannot write to '{directory}': {reason(error)}. {advice}") from error
        owner = ""
        with contextlib.suppress(OSError):
            owner = f" (the folder belongs to {user_name(directory.stat().st_uid)})"
        raise TransportError(
            f"the server's certificates in '{directory}' cannot be used by {current_user()}: {reason(error)}{owner}. "
            f"Start the server as the user to whom they belong, set {HOME_VARIABLE} to a folder of this user's own, or "
            "start with --insecure"
        ) from error
    except UNREADABLE as error:
        raise TransportError(
            f"the files in '{directory}' are damaged or not FedShelf's certificates and keys: restore them from a "
            f"backup; or {_start_anew(directory)}"
        ) from error


def _names(hosts: Iterable[str], say: Callable[[str], None]) -> list[x509.GeneralName]:
    """Return the certificate's names. A name that a certificate cannot hold is omitted and reported."""
    names: list[x509.GeneralName] = []
    for name in dict.fromkeys(("localhost", "127.0.0.1", "::1", socket.gethostname(), *own_addresses(), *hosts)):
        if Address(host=name, port=0).is_wildcard:
            continue
        if problem := host_problem(name):
            say(f"the name {name!r} is left out of the server's certificate ({problem}): clients cannot use it")
        else:
            ip = parse_ip(name)
            names.append(x509.DNSName(name.encode("idna").decode("ascii")) if ip is None else x509.IPAddress(ip))
    return names


def _is_usable(tls: ServerTls, ca: x509.Certificate, names: Iterable[x509.GeneralName], now: datetime.datetime) -> bool:
    if not (tls.certificate.exists() and tls.key.exists()):
        return False
    try:
        certificate = read_certificate(tls.certificate)
        certificate.verify_directly_issued_by(ca)
        if certificate.public_key() != read_key(tls.key).public_key():
            return False  # interrupted between the two writes
        held = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (*UNREADABLE, InvalidSignature):
        return False
    ends_soon = certificate.not_valid_after_utc - now < RENEW_BEFORE
    return not ends_soon and not validity(certificate, now) and all(name in held for name in names)


def _builder(
    *, subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, start: datetime.datetime,
    end: datetime.datetime,
) -> x509.CertificateBuilder:  # fmt: skip
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _subject(role: str, joint: str) -> x509.Name:
    """Return `role` with this machine's name, if that is valid and fits."""
    host = socket.gethostname()
    whole = f"{role}{joint}{host}"
    fits = len(whole) <= MAX_COMMON_NAME and not host_problem(host)
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, whole if fits else role)])


def read_certificate(path: Path) -> x509.Certificate:
    """Read a PEM certificate."""
    return x509.load_pem_x509_certificate(path.read_bytes())


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a PEM key.

    Raises:
        ValueError: it is not an elliptic-curve key.
    """
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path.name} is not an elliptic-curve key")
    return key


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    write_atomically(path, key.private_bytes(encoding, form, serialization.NoEncryption()), mode=0o600)
