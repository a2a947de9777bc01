"""Translates errors of the network, TLS or a proxy into one sentence with a remedy.

Two classes tell a client what to do::

    ServerUnavailableError    may be temporary: retry
    TransportError            permanent: stop and report

No other module translates errors of `socket`, `ssl` and `http.client`.
"""

import datetime
import http.client
import socket
import ssl
from collections.abc import Callable

from cryptography import x509

from fedshelf.core.errors import TransportError
from fedshelf.core.system_errors import reason
from fedshelf.deploy.address import Address
from fedshelf.deploy.proxy import Proxy

NOT_YET_VALID, EXPIRED, HOST_MISMATCH, IP_MISMATCH = 9, 10, 62, 64  # OpenSSL's X509_V_ERR_*
NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG")
REJECTED = ("UNKNOWN_CA", "CERTIFICATE_UNKNOWN", "BAD_CERTIFICATE", "CERTIFICATE_EXPIRED", "CERTIFICATE_REVOKED")
PASSING_STATUSES = frozenset({408, 429, 502, 503, 504})

PeerCertificate = Callable[[], bytes | None]
"""Fetches the peer's certificate (DER) without verifying it; returns None if that fails."""


class ServerUnavailableError(TransportError):
    """The server is temporarily unreachable or unusable; retrying may help."""


class CertificateRejectedError(TransportError):
    """The server does not accept this client's certificate, for example because it has another authority."""


class SessionLostError(Exception):
    """The server does not know this registration, so register again. Not raised outside this package."""


UNKNOWN_SESSION = "the server was restarted and no longer knows this session. This client joins again by itself"


def unreachable(error: Exception, server: Address, proxy: Proxy | None) -> ServerUnavailableError:
    """Describe a failed TCP connection.

    Args:
        error: the original error.
        server: the server's address.
        proxy: the proxy to connect through, if any.

    Returns:
        The error to raise.
    """
    target, what = (server, "the server") if proxy is None else (proxy.address, f"the proxy ({proxy.variable})")
    if isinstance(error, socket.gaierror | UnicodeError):
        advice = f"check the spelling of {target.host}, and this machine's name service"
    elif isinstance(error, ConnectionRefusedError):
        advice = "check that it runs, and its port"
    else:
        advice = "check the address, the network, and firewalls in between"
    return ServerUnavailableError(f"cannot connect to {what} at {target}: {reason(error)}; {advice}")


def no_tunnel(problem: Exception | int, server: Address, proxy: Proxy) -> TransportError:
    """Describe a proxy that does not connect to the server.

    Args:
        problem: the proxy's HTTP status, or the original error.
        server: the server's address.
        proxy: the proxy.

    Returns:
        The error to raise.
    """
    kind: type[TransportError] = ServerUnavailableError
    advice = f"check that the server runs, and that {proxy.variable} names an HTTP proxy"
    if isinstance(problem, Exception):
        answer = reason(problem)
    else:
        answer = f"it answers {problem} {http.client.responses.get(problem, '')}".rstrip()
        if problem < 500 and problem not in PASSING_STATUSES:
            kind = TransportError
            advice = f"have it allow CONNECT to {server}, or list {server.host} in NO_PROXY if no proxy is needed"
        if problem == 407:
            advice = f"put a user and password that it accepts into {proxy.variable} (http://USER:PASSWORD@HOST:PORT)"
    return kind(f"{proxy} does not connect to {server}: {answer}; {advice}")


def tls_failed(
    error: Exception, server: Address, proxy: Proxy | None, context: ssl.SSLContext, peer: PeerCertificate
) -> TransportError:
    """Describe a failed TLS handshake.

    Args:
        error: the original error.
        server: the server's address.
        proxy: the proxy in use, if any.
        context: the TLS settings the server was checked against.
        peer: fetches the server's certificate.

    Returns:
        The error to raise.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return _not_verified(error, server, proxy, context, peer)
    if isinstance(error, ssl.SSLError) and getattr(error, "reason", "") in NOT_TLS:
        return TransportError(
            f"{server} does not encrypt: another program listens there, or a FedShelf server that runs with "
            "--insecure. Check --server-address, and have the server run without --insecure (on a machine of your own, "
            "for a trial, this client can be given --insecure, too)"
        )
    through = "" if proxy is None else f", through {proxy}"
    return ServerUnavailableError(
        f"no encrypted connection to {server}{through}: {reason(error)}; check that a FedShelf server listens there"
    )


def broken(error: Exception, server: Address) -> TransportError:
    """Describe an established connection that broke during a request.

    Args:
        error: the original error.
        server: the server's address.

    Returns:
        The error to raise.
    """
    if isinstance(error, ssl.SSLError) and any(alert in str(error.reason) for alert in REJECTED):
        return CertificateRejectedError(f"{server} does not accept this client's certificate ({reason(error)})")
    return ServerUnavailableError(f"the connection to {server} broke: {reason(error)}")


def validity(certificate: x509.Certificate, now: datetime.datetime) -> str:
    """Explain why a certificate is not valid now, with its dates and the current time.

    Args:
        certificate: the certificate.
        now: the current time.

    Returns:
        The reason, or an empty string if the certificate is valid.
    """
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if start <= now <= end:
        return ""
    problem = "is not yet valid" if now < start else "has expired"
    return (
        f"{problem}: it holds from {start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC, and this machine's clock shows "
        f"{now:%Y-%m-%d %H:%M} UTC"
    )


def _not_verified(
    error: ssl.SSLCertVerificationError, server: Address, proxy: Proxy | None, context: ssl.SSLContext,
    peer: PeerCertificate,
) -> TransportError:  # fmt: skip
    if error.verify_code in (NOT_YET_VALID, EXPIRED):
        return ServerUnavailableError(_out_of_time(error, server, context, peer()))
    if error.verify_code in (HOST_MISMATCH, IP_MISMATCH):
        return TransportError(
            f"the certificate of {server} is not made out to {server.host}: start the server with "
            f"--advertise {server}, or use a name or address that is in it"
        )
    inspected = f" (or {proxy} opens the encryption: have it pass {server} unopened)" if proxy else ""
    return TransportError(
        f"the certificate of {server} is not to be trusted ({error.verify_message}): it comes from another authority "
        f"than this client's{inspected}. Ask headquarters; if the server was set up anew, start this client with a new "
        "token (--token), or with a copy of the server's ca.pem (--ca)"
    )


def _out_of_time(
    error: ssl.SSLCertVerificationError, server: Address, context: ssl.SSLContext, shown: bytes | None
) -> str:
    """Describe which certificate the clock disagrees with, and what to do."""
    now = datetime.datetime.now(datetime.UTC)
    if shown is not None:
        certificate = x509.load_der_x509_certificate(shown)
        if problem := validity(certificate, now):
            return (
                f"the certificate of {server} {problem}. Set this machine's clock if it is wrong; else restart the "
                "server, which renews its certificate"
            )
        for authority in map(x509.load_der_x509_certificate, context.get_ca_certs(binary_form=True)):
            if authority.subject == certificate.issuer and (problem := validity(authority, now)):
                return (
                    f"the certificate authority of {server} {problem}. Set this machine's clock if it is wrong; else "
                    "the server needs a new authority, and this client a new token: ask headquarters"
                )
    return f"the certificate of {server}: {error.verify_message}; check this machine's clock and the server's"
