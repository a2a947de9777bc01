"""How a client proves who it is: it enrolls once, signs its requests, and renews its certificate."""

import contextlib
import datetime
import hashlib
import json
import logging
import secrets
import socket
import ssl
import time
from collections.abc import Mapping
from pathlib import Path

from cryptography import x509

from fedshelf.config import places
from fedshelf.core.errors import FedShelfError, IdentityError, RosterError, TransportError
from fedshelf.core.text import printable
from fedshelf.deploy.address import Address, own_addresses
from fedshelf.deploy.connection_errors import PASSING_STATUSES, CertificateRejectedError, ServerUnavailableError
from fedshelf.deploy.greeting import greet
from fedshelf.deploy.http_connection import Answer, HttpConnection
from fedshelf.deploy.tls import client_context
from fedshelf.identity import certificates
from fedshelf.identity.keys import KeyPair, PublicKey
from fedshelf.identity.signatures import NO_BODY, UNSIGNED_BODY, SignedRequest
from fedshelf.identity.store_keys import Enrollment, StoreKeys
from fedshelf.identity.tokens import Token

logger = logging.getLogger(__name__)

REQUEST_SECONDS = 30.0
_NONCE_BYTES = 12


class Signer:
    """Signs the requests of one session.

    Args:
        keys: the store's keys.
        server: SHA-256 of the server's certificate (hex); "" without TLS.
        server_time: the server's time, in seconds since 1970; None to go by this machine's clock.

    Attributes:
        session: the session, 16 bytes.
        clock_ahead: seconds by which this machine's clock is ahead of the server's; 0 if that does not say its time.
    """

    def __init__(self, keys: StoreKeys, *, server: str, server_time: float | None) -> None:
        self.session = secrets.token_bytes(16)
        self._keys = keys.pair()
        self._server = server
        self.clock_ahead = 0.0 if server_time is None else time.time() - server_time
        self._ahead = time.time() - self.clock_ahead - time.monotonic()

    def headers(self, method: str, path: str, body: bytes | None = b"") -> Mapping[str, str]:
        """Sign a request.

        Args:
            method: the HTTP method.
            path: the path.
            body: the body; None if the path names its digest.

        Returns:
            Headers to send.
        """
        digest = UNSIGNED_BODY if body is None else hashlib.sha256(body).hexdigest() if body else NO_BODY
        return SignedRequest(
            method=method, path=path, digest=digest, session=self.session.hex(), time=time.monotonic() + self._ahead,
            nonce=secrets.token_hex(_NONCE_BYTES), server=self._server,
        ).signed_by(self._keys)  # fmt: skip


class Credentials:
    """A client's access to one server.

    Args:
        address: the server's address.
        keys: the store's keys.
        name: the store's name.
        token: admits the store if it is not enrolled yet, or no longer.
        ca: the only authority to trust; None trusts the one that a token named, this machine's own server, and the
            system's.
        insecure: disable TLS.
    """

    def __init__(
        self, address: Address, keys: StoreKeys, *, name: str, token: Token | None = None, ca: Path | None = None,
        insecure: bool = False,
    ) -> None:  # fmt: skip
        self.address = address
        self.keys = keys
        self._name = name
        self._token = token
        self._ca = ca
        self._insecure = insecure
        self._may_start_over = True
        self._rejection: FedShelfError | None = None

    def prepare(self) -> ssl.SSLContext | None:
        """Enroll if this store is not enrolled.

        Returns:
            The TLS settings; None without TLS.

        Raises:
            ServerUnavailableError: the server does not answer for now.
            TransportError: the server cannot be trusted.
            IdentityError: the server does not admit this store.
        """
        enrollment = self.keys.enrollment()
        has_new_token = self._token is not None and not (enrollment and enrollment.token == self._token.digest)
        if enrollment is None or self._rejection is not None or has_new_token:
            try:
                self.enroll()
            except IdentityError as error:
                self._may_start_over, self._token = False, None
                if enrollment is None or self._rejection is not None:
                    raise self._rejection or error from error
                logger.warning("%s; this store uses the key that it has", error)
        elif enrollment.name != self._name:
            raise IdentityError(
                f"this client is enrolled as '{enrollment.name}', not as '{self._name}': leave --name out, or give "
                "another --state-dir"
            )
        elif self.keys.must_renew(_now()):
            self._renew()
        return self._context()

    def enroll(self) -> None:
        """Ask the server for a certificate, with the token, with the one of a server on this machine, or with none.

        Raises:
            ServerUnavailableError: the server does not answer for now.
            TransportError: the server cannot be trusted.
            IdentityError: the server does not admit this store.
        """
        token, authority, enrollment = self._token, "", self.keys.enrollment()
        if token is not None and self._ca is not None and not self._insecure:  # before the token is spent
            with contextlib.closing(
                HttpConnection(self.address, client_context(self._ca), timeout=REQUEST_SECONDS)
            ) as connection:
                greet(connection, self.address, encrypted=True)
        if token is not None and token.authority and not self._insecure:
            authority = self._fetch_authority(token)
        context = None if self._insecure else _pinned(authority) if authority else client_context(self.trusted)
        keys = self.keys.next_pair()
        request = certificates.signing_request(keys)
        with contextlib.closing(HttpConnection(self.address, context, timeout=REQUEST_SECONDS)) as connection:
            try:
                greet(connection, self.address, encrypted=context is not None)
            except TransportError as error:
                if token is None and isinstance(error.__cause__, ssl.SSLCertVerificationError) and not self._ca:
                    raise type(error)(f"{error}. A store that is not enrolled yet needs a token (--token)") from error
                raise
            secret = token.secret if token else local_secret(self.address)  # a server writes it before it listens
            body = json.dumps({"token": secret, "name": self._name, "request": request}).encode()
            answer = connection.request("POST", "/fedshelf/enroll", {"content-type": "application/json"}, body)
        # Used again, a token vouches for nothing: the server that rejects this store may be another one by now.
        is_new = token is not None and (enrollment is None or enrollment.token != token.digest)
        self._save(answer, authority, keys, is_trusted=is_new or (token is None and bool(secret)))
        self._token = self._rejection = None

    def accepted(self) -> None:
        """Note that the server has accepted this store."""
        self._may_start_over = True

    def rejects_certificate(self) -> bool:
        """Whether the server answers without this store's certificate, though it does not with it."""
        if self._insecure:
            return False
        try:
            with contextlib.closing(
                HttpConnection(self.address, client_context(self.trusted), timeout=REQUEST_SECONDS)
            ) as connection:
                greet(connection, self.address, encrypted=True)
        except TransportError:
            return False
        return True

    def start_over(self, rejection: FedShelfError) -> bool:
        """Have `prepare` enroll with a new key, or renew the certificate if it has expired.

        Args:
            rejection: how the server rejected this key or certificate.

        Returns:
            False if that was tried already.
        """
        may, self._may_start_over = self._may_start_over, False
        expired = isinstance(rejection, CertificateRejectedError) and self.keys.must_renew(_now())
        self._rejection = rejection if may and not expired else None
        return may

    @property
    def trusted(self) -> Path | None:
        """The only authority to trust; None for this machine's own server and the system's authorities."""
        return self._ca or self.keys.authority_file

    def _renew(self) -> None:
        """Fetch the next certificate. A server that does not renew it may still accept this one."""
        enrollment, context = self.keys.enrollment(), self._context()
        with contextlib.closing(HttpConnection(self.address, context, timeout=REQUEST_SECONDS)) as connection:
            server_time = greet(connection, self.address, encrypted=context is not None)
            signer = Signer(self.keys, server=connection.server_fingerprint(), server_time=server_time)
            body = json.dumps({"request": certificates.signing_request(self.keys.pair())}).encode()
            headers = {**signer.headers("POST", "/fedshelf/renew", body), "content-type": "application/json"}
            answer = connection.request("POST", "/fedshelf/renew", headers, body)
        if answer.status == 200:
            self._save(answer, enrollment.authority if enrollment else "", self.keys.pair(), enrollment)
        else:
            logger.warning("the certificate was not renewed: the server answers %d", answer.status)

    def _save(
        self, answer: Answer, pinned: str, keys: KeyPair, renews: Enrollment | None = None, *, is_trusted: bool = False
    ) -> None:  # fmt: skip
        """Save the server's answer to a request for a certificate.

        Args:
            answer: the answer.
            pinned: the authority that was checked; "" for none.
            keys: the keys to certify.
            renews: what the store was enrolled with, if it only renews its certificate.
            is_trusted: whether the chain's key may be another one than before.
        """
        if answer.status in PASSING_STATUSES or answer.status == 401:  # FedShelf never answers 401 here: a proxy did
            raise ServerUnavailableError(f"{self.address} answers {answer.status} to the request to enroll")
        try:
            fields = json.loads(answer.content)
            if answer.status != 200:
                raise IdentityError(f"{self.address} does not enroll this store: {printable(str(fields['detail']))}")
            enrollment = Enrollment(
                name=str(fields["name"]), chain=PublicKey(str(fields["chain"])),
                certificate=str(fields["certificate"]), authority=str(fields["authority"]) if pinned else "",
                token=renews.token if renews else self._token.digest if self._token else "",
            )  # fmt: skip
            x509.load_pem_x509_certificate(enrollment.certificate.encode("ascii"))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise TransportError(
                f"{self.address} answers {answer.status} to the request to enroll, and not as a FedShelf server does: "
                "check --server-address"
            ) from error
        known = renews or (None if is_trusted else self.keys.enrollment())
        if known is not None and known.chain != enrollment.chain:
            raise RosterError(
                f"{self.address} shows another chain's key than when this store was enrolled: ask headquarters whether "
                "the server was set up anew; if so, get a new token"
            )
        self.keys.save(enrollment, keys)

    def _context(self) -> ssl.SSLContext | None:
        """The TLS settings, with this store's certificate unless it has expired."""
        if self._insecure:
            return None
        context = client_context(self.trusted)
        if not self._is_expired():
            context.load_cert_chain(self.keys.certificate_file, self.keys.key_file)
        return context

    def _is_expired(self) -> bool:
        try:
            certificate = x509.load_pem_x509_certificate(self.keys.certificate_file.read_bytes())
        except (OSError, ValueError):
            return True
        return certificate.not_valid_after_utc < _now()

    def _fetch_authority(self, token: Token) -> str:
        """Fetch the authority that the token names."""
        authority, fingerprint = fetch_authority(self.address)
        if fingerprint == token.authority:
            return authority
        raise TransportError(
            f"{self.address} has another certificate authority than the token says: something stands between this "
            "store and the server, or the token is of another server. Stop here, and ask headquarters for a new token"
        )


def fetch_authority(address: Address) -> tuple[str, str]:
    """Fetch a server's certificate authority. Nothing is sent that an eavesdropper could use.

    Returns:
        The certificate (PEM), which only its fingerprint can verify, and the fingerprint (hex); both empty if the
        server has none of its own.

    Raises:
        TransportError: the server cannot be reached.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the fingerprint is what is verified
    with contextlib.closing(HttpConnection(address, context, timeout=REQUEST_SECONDS)) as connection:
        content = connection.request("GET", "/fedshelf/authority", {}).content
    try:
        return content.decode("ascii"), certificates.fingerprint(x509.load_pem_x509_certificate(content))
    except ValueError:
        return "", ""


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _pinned(authority: str) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=authority)


def local_secret(address: Address) -> str:
    """The secret that a server of this user on this machine has left for its clients.

    Args:
        address: the server to send it to; another machine's gets nothing.

    Returns:
        The secret; "" if there is none for that server.
    """
    if not (address.is_loopback or address.host in (socket.gethostname(), *own_addresses())):
        return ""
    try:
        return (places.identity_directory() / "local.token").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
