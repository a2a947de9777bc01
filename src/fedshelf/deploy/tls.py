"""The server's own certificate authority and certificate, so that encryption works from the first start.

The authority is valid for three years. A year before its end it is renewed with the same key, so that what it issued
stays valid; stores get its new certificate together with their own. The server's certificate is reissued when it lacks
a name or is about to expire, also while the server runs. The authority's key is never replaced, because that would lock
out every store; it may be kept elsewhere, as long as no certificate has to be issued. Both certificates are valid from
a fixed date in the past, so that a fast server clock does no harm.
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
from cryptography.hazmat.primitives import hashes

from fedshelf.config.places import HOME_VARIABLE, tls_directory
from fedshelf.core.errors import TransportError, UsageError
from fedshelf.core.system_errors import current_user, reason, user_name
from fedshelf.deploy.address import Address, host_problem, own_addresses, parse_ip
from fedshelf.deploy.connection_errors import validity
from fedshelf.identity import certificates
from fedshelf.identity.keys import KeyPair, passphrase, passphrase_problem, private_key
from fedshelf.storage.atomic_files import disk_advice, write_atomically

logger = logging.getLogger(__name__)

VALID_FROM = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)  # before FedShelf existed: an earlier clock is wrong
CA_LIFETIME = datetime.timedelta(days=3 * 365)
RENEW_CA_BEFORE = datetime.timedelta(days=365)
CERTIFICATE_LIFETIME = datetime.timedelta(days=90)
RENEW_BEFORE = datetime.timedelta(days=30)
UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm, x509.ExtensionNotFound, x509.DuplicateExtension)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerTls:
    """A server's PEM files.

    Attributes:
        ca: the authority's certificate, to distribute; of a certificate from elsewhere, that certificate.
        certificate: the server's certificate.
        key: the server's key.
        is_own: whether the certificate is from elsewhere.
    """

    ca: Path
    certificate: Path
    key: Path
    is_own: bool = False


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
    ca_path = directory / "ca.pem"
    tls = ServerTls(ca=ca_path, certificate=directory / "server.pem", key=directory / "server.key")
    names = _names(hosts, say)
    with _explaining_errors(directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        ca, ca_keys = _authority(tls, ca_path, now)
        if ca_keys is not None and not _is_usable(tls, ca, names, now, RENEW_BEFORE):
            issue(tls, ca, ca_keys, names, end=now + CERTIFICATE_LIFETIME)
        elif ca_keys is None:
            if not _is_usable(tls, ca, names, now):
                raise TransportError(
                    f"'{ca_path.with_suffix('.key')}' is missing, and the server needs a new certificate from the "
                    f"authority in '{ca_path}': put the key there for the next start; if it is lost, "
                    f"{_start_anew(directory)}"
                )
            if not _is_usable(tls, ca, names, now, RENEW_BEFORE):
                end = read_certificate(tls.certificate).not_valid_after_utc
                say(f"the server's certificate ends on {end:%Y-%m-%d}: put the authority's ca.key there to renew it")
    return tls


def fingerprint(certificate: Path) -> str:
    """Return the SHA-256 fingerprint of a PEM certificate (AB:CD:…), for people to compare."""
    return read_certificate(certificate).fingerprint(hashes.SHA256()).hex(":").upper()


def certificate_fingerprint(certificate: Path) -> str:
    """Return the SHA-256 fingerprint of a PEM certificate, in hexadecimal digits."""
    return read_certificate(certificate).fingerprint(hashes.SHA256()).hex()


def client_context(ca: Path | None) -> ssl.SSLContext:
    """Create the TLS settings that a client checks the server against.

    Args:
        ca: the only authority to trust, a file created by `fedshelf server`; None trusts this machine's own server and
            the system's authorities.

    Returns:
        The TLS settings.

    Raises:
        UsageError: the file cannot be read or does not contain a certificate.
    """
    try:
        if ca is not None:
            return ssl.create_default_context(cafile=str(ca))
        context = ssl.create_default_context()
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.filename:  # not about the authority: see SSLKEYLOGFILE
            raise UsageError(f"TLS cannot be set up: '{error.filename}': {reason(error)}") from error
        why = (
            "it does not hold a certificate"
            if isinstance(error, ssl.SSLError)
            else f"{current_user()}: {reason(error)}"
        )
        raise UsageError(
            f"--ca {ca}: {why}; give a copy of the ca.pem that 'fedshelf server' names when it starts"
        ) from error
    local = local_authority()
    if local:
        try:
            context.load_verify_locations(cadata=local)
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                f"'{tls_directory() / 'ca.pem'}' does not hold a certificate: give the server's ca.pem with --ca FILE"
            ) from error
    return context


def local_authority() -> str:
    """Return the certificate (PEM) of this machine's own authority; empty if no server has created one.

    Raises:
        UsageError: this user may not read it.
    """
    path = tls_directory() / "ca.pem"
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise UsageError(
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
    keys = KeyPair.generate()
    certificate = certificates.authority(
        keys, certificates.subject(_name("FedShelf authority", " of ")), start=start, end=end
    )
    keys.save(key_path, passphrase=passphrase())
    write_atomically(path, certificates.pem(certificate))


def issue(
    tls: ServerTls,
    ca: x509.Certificate,
    ca_keys: KeyPair,
    names: Iterable[x509.GeneralName],
    *,
    end: datetime.datetime,
    start: datetime.datetime | None = None,
) -> None:
    """Create the server's certificate and key.

    Args:
        tls: where to write them.
        ca: the authority's certificate.
        ca_keys: the authority's keys.
        names: the names that clients use for the server.
        end: end of validity.
        start: start of validity; defaults to that of the authority.
    """
    keys = KeyPair.generate()
    certificate = certificates.issue(
        ca, ca_keys, keys.private.public_key(), _name("FedShelf server", " "),
        start=start or ca.not_valid_before_utc, end=end, names=names,
    )  # fmt: skip
    keys.save(tls.key)
    write_atomically(tls.certificate, certificates.pem(certificate))


def own_server_tls(certificate: Path, key: Path) -> ServerTls:
    """Use a certificate that the operator has from elsewhere.

    Args:
        certificate: the server's certificate (PEM), followed by those between it and its authority.
        key: its key.

    Returns:
        The files.

    Raises:
        TransportError: they cannot be read, or do not belong together.
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except (OSError, ValueError) as error:
        raise TransportError(
            f"--tls-cert {certificate}, --tls-key {key}: {reason(error)}; give a certificate (PEM) and the key that "
            "belongs to it"
        ) from error
    return ServerTls(ca=certificate, certificate=certificate, key=key, is_own=True)


def _authority(tls: ServerTls, ca_path: Path, now: datetime.datetime) -> tuple[x509.Certificate, KeyPair | None]:
    """Load the authority, or create one if none ever existed.

    Returns:
        The certificate, renewed in good time, and its keys; None if they are not on this machine.
    """
    directory, key_path = ca_path.parent, ca_path.with_suffix(".key")
    if not (ca_path.exists() or tls.certificate.exists() or tls.key.exists()):  # at most a first start was interrupted
        make_authority(ca_path, key_path, start=VALID_FROM, end=now + CA_LIFETIME)
    elif not ca_path.exists():
        raise TransportError(
            f"'{ca_path}' is missing, but '{directory}' was in use: copy it back from a backup or from any store, "
            f"which has the same file; or {_start_anew(directory)}"
        )
    ca, keys = read_certificate(ca_path), read_key(key_path) if key_path.exists() else None
    if keys is not None and ca.public_key() != keys.private.public_key():
        raise TransportError(
            f"'{key_path}' is not the key of '{ca_path}': restore both from the same backup; or "
            f"{_start_anew(directory)}"
        )
    if problem := validity(ca, now):
        raise TransportError(
            f"the certificate authority in '{ca_path}' {problem}. Set the clock if it is wrong; else "
            f"{_start_anew(directory)}"
        )
    if keys is not None and ca.not_valid_after_utc - now < RENEW_CA_BEFORE:
        ca = certificates.authority(keys, ca.subject, start=VALID_FROM, end=now + CA_LIFETIME)
        write_atomically(ca_path, certificates.pem(ca))
    return ca, keys


def _start_anew(directory: Path) -> str:
    folder = shlex.quote(str(directory))
    return (
        f"start anew: stop the server, move the folder away (mv {folder} {shlex.quote(f'{directory}.old')}), start the "
        "server, and give every store a new token (fedshelf enroll rotate NAME)"
    )


@contextlib.contextmanager
def _explaining_errors(directory: Path) -> Iterator[None]:
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


def _is_usable(
    tls: ServerTls, ca: x509.Certificate, names: Iterable[x509.GeneralName], now: datetime.datetime,
    at_least: datetime.timedelta = datetime.timedelta(0),
) -> bool:  # fmt: skip
    """Whether the server's certificate is for `names`, and valid for at least that time."""
    if not (tls.certificate.exists() and tls.key.exists()):
        return False
    try:
        certificate = read_certificate(tls.certificate)
        certificate.verify_directly_issued_by(ca)
        if certificate.public_key() != KeyPair(private_key(tls.key.read_bytes())).private.public_key():
            return False  # interrupted between the two writes
        held = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (*UNREADABLE, InvalidSignature):
        return False
    ends_soon = certificate.not_valid_after_utc - now < at_least
    return not ends_soon and not validity(certificate, now) and all(name in held for name in names)


def _name(role: str, joint: str) -> str:
    """Return `role` with this machine's name, if that is valid and fits."""
    host = socket.gethostname()
    whole = f"{role}{joint}{host}"
    return whole if len(whole) <= certificates.MAX_COMMON_NAME and not host_problem(host) else role


def read_certificate(path: Path) -> x509.Certificate:
    """Read a PEM certificate."""
    return x509.load_pem_x509_certificate(path.read_bytes())


def read_key(path: Path) -> KeyPair:
    """Read a PEM key, encrypted if there is a passphrase.

    Raises:
        ValueError: it is not a P-256 key.
        IdentityError: a passphrase is missing or superfluous.
    """
    try:
        return KeyPair(private_key(path.read_bytes(), passphrase()))
    except TypeError:
        raise passphrase_problem(path, passphrase()) from None
