"""Who may speak to the server: authenticates requests by their signatures, and enrolls stores.

Without a signature by an enrolled key, a peer reaches nothing but these routes, which take no more than 4 KB:

    GET  /healthz, /fedshelf/health   the server's version and time
    GET  /fedshelf/authority          the certificate that the fingerprint in a token names
    POST /fedshelf/enroll             a token and a signing request, for a certificate
    POST /fedshelf/renew              a signed request of an enrolled key, for its next certificate

Everything else, such as `GET /fedshelf/roster`, needs a signature (`identity.signatures`) and, with TLS, a client
certificate for the same key. The signature is checked before the body is read.
"""

import hashlib
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from fedshelf.core.errors import FedShelfError, IdentityError, IdentityFileError
from fedshelf.core.text import printable
from fedshelf.identity import certificates, signatures
from fedshelf.identity.chain import Chain
from fedshelf.identity.keys import PublicKey
from fedshelf.identity.roster import StoreState
from fedshelf.identity.signatures import Nonces, SignedRequest

logger = logging.getLogger(__name__)

MAX_ENROLLMENT_BYTES = 4 << 10
ATTEMPTS_A_MINUTE = 120  # to enroll, from one address: a hundred stores may be behind one
_MOST_ADDRESSES = 4096
_SESSION_CHARACTERS = 32


class UnauthenticatedError(Exception):
    """A request that is not authenticated. Not raised outside this package.

    Args:
        reason: what is wrong.
        is_final: whether the same client would be refused again: its key is unknown or revoked.
    """

    def __init__(self, reason: str, *, is_final: bool = False) -> None:
        super().__init__(reason)
        self.is_final = is_final


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who sent a request, as proved by its signature.

    Attributes:
        key: the key.
        name: the store's name in the roster.
        session: the client's session.
        digest: SHA-256 of the body (hex), or `UNSIGNED_BODY`.
    """

    key: PublicKey
    name: str
    session: bytes
    digest: str

    def sent(self, body: bytes) -> bool:
        """Whether `body` is the one that was signed."""
        return hashlib.sha256(body).hexdigest() == self.digest


class Admission:
    """Authenticates and enrolls. Thread-safe.

    Args:
        chain: the chain's identity.
        authority: the certificate of the server's authority; None without TLS, or if the server's certificate comes
            from another authority.
        servers: returns the fingerprints of the server's certificates; none without TLS.
    """

    def __init__(
        self, chain: Chain, *, authority: Path | None = None, servers: Callable[[], Collection[str]] = tuple
    ) -> None:  # fmt: skip
        self.chain = chain
        self._authority = authority
        self._servers = servers
        self._nonces = Nonces()
        self._attempts: dict[str, deque[float]] = {}

    def authenticate(
        self, method: str, path: str, headers: Mapping[bytes, bytes], certified: str | None, *, renews: bool = False
    ) -> Caller:  # fmt: skip
        """Find out who sent a request.

        Args:
            method: the HTTP method.
            path: the path.
            headers: the headers.
            certified: the key of the connection's client certificate; None if there is none.
            renews: whether the request is for a new certificate, which an expired one does not prevent.

        Returns:
            The caller.

        Raises:
            UnauthenticatedError: the signature is missing, wrong, too old, or was used before; or the key is not
                active.
        """
        try:
            key, session, sent_at, nonce, digest, signature = (
                headers[name.encode()].decode("ascii")
                for name in (
                    signatures.KEY, signatures.SESSION, signatures.TIME, signatures.NONCE, signatures.DIGEST,
                    signatures.SIGNATURE,
                )
            )  # fmt: skip
            public, moment, raw_session = PublicKey(key), float(sent_at), bytes.fromhex(session)
        except (KeyError, ValueError):
            raise UnauthenticatedError("the request is not signed") from None
        if len(session) != _SESSION_CHARACTERS or len(nonce) > _SESSION_CHARACTERS or not public.is_valid:
            raise UnauthenticatedError("the request is not signed")
        entry = self.chain.find(public)
        if entry is None:
            raise UnauthenticatedError("this key is not enrolled at this server", is_final=True)
        if entry.state is not StoreState.ACTIVE:
            raise UnauthenticatedError(f"the key of '{entry.name}' was revoked on {entry.since}", is_final=True)
        servers = self._servers()
        if servers and not renews and certified != key:
            raise UnauthenticatedError("the connection has no certificate for the key that signed the request")
        if not abs(time.time() - moment) <= signatures.WINDOW_SECONDS:
            raise UnauthenticatedError(
                f"the request's time is more than {signatures.WINDOW_SECONDS:g} s from the server's"
            )
        if not any(
            SignedRequest(
                method=method, path=path, digest=digest, session=session, time=moment, nonce=nonce, server=server
            ).is_signed(public, signature)
            for server in servers or ("",)
        ):
            raise UnauthenticatedError("the signature is wrong, or for another server")
        if not self._nonces.is_new(key, nonce):
            raise UnauthenticatedError("the request was sent before")
        return Caller(key=public, name=entry.name, session=raw_session, digest=digest)

    def enroll(self, address: str, body: bytes) -> tuple[int, bytes]:
        """Answer a request to enroll.

        Args:
            address: the peer's address.
            body: ``{"token": …, "name": …, "request": PEM}``.

        Returns:
            HTTP status and JSON.
        """
        if not self._may_try(address):
            self.chain.audit.count("enrolling too often", address)
            return _refused(429, f"more than {ATTEMPTS_A_MINUTE} attempts in a minute: try again later")
        try:
            fields = json.loads(body)
            secret, name, request = (fields[field] for field in ("token", "name", "request"))
            if not all(isinstance(text, str) for text in (secret, name, request)):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            return _refused(400, "not a request to enroll")
        try:
            entry, certificate = self.chain.enroll(secret, name, request)
        except FedShelfError as error:
            if isinstance(error, IdentityError) and not isinstance(error, IdentityFileError):
                self.chain.audit.count(f"enrollment refused: {error}", address)
                return _refused(403, str(error))
            logger.error("a store cannot enroll: %s", error)
            return _refused(503, "the server cannot enroll anybody at the moment: its log says why")
        return 200, self._granted(entry.name, certificate)

    def renew(self, caller: Caller, body: bytes) -> tuple[int, bytes]:
        """Answer an authenticated request for a new certificate, ``{"request": PEM}``.

        Returns:
            HTTP status and JSON.
        """
        try:
            return 200, self._granted(caller.name, self.chain.renew(caller.key, str(json.loads(body)["request"])))
        except (ValueError, KeyError, TypeError, RecursionError, IdentityError):
            return _refused(400, "not a request for a certificate of the key that signed it")

    def roster(self) -> tuple[int, bytes]:
        """Answer an authenticated request for the signed roster.

        Returns:
            HTTP status and JSON.
        """
        try:
            return 200, self.chain.signed_roster().encode()
        except FedShelfError:
            return _refused(503, "the server cannot read its roster at the moment: its log says why")

    def authority(self) -> bytes:
        """The server's authority (PEM); empty if there is none to pin."""
        return b"" if self._authority is None else self._authority.read_bytes()

    def refused(self, address: str, reason: str) -> None:
        """Count a request that was not authenticated."""
        self.chain.audit.count(f"unauthenticated: {reason}", address)

    def limited(self, address: str, caller: Caller, what: str) -> None:
        """Count a request of a store that is over a limit."""
        self.chain.audit.count(f"over its limit: {what}", address, caller.name)

    def _granted(self, name: str, certificate: x509.Certificate) -> bytes:
        fields = {
            "name": name, "chain": self.chain.key.text, "certificate": certificates.pem(certificate).decode("ascii"),
            "authority": self.authority().decode("ascii"),
        }  # fmt: skip
        return json.dumps(fields).encode()

    def _may_try(self, address: str) -> bool:
        now = time.monotonic()
        if len(self._attempts) >= _MOST_ADDRESSES:
            self._attempts = {a: tried for a, tried in self._attempts.items() if tried and now - tried[-1] < 60.0}
        tried = self._attempts.setdefault(address, deque(maxlen=ATTEMPTS_A_MINUTE))
        if len(tried) == ATTEMPTS_A_MINUTE and now - tried[0] < 60.0:
            return False
        tried.append(now)
        return True


def certified_key(certificate: bytes | None) -> str | None:
    """The key of a client certificate.

    Args:
        certificate: the certificate (DER), verified by TLS; None if there is none.

    Returns:
        The text of its key; None if there is none.
    """
    if certificate is None:
        return None
    try:
        return PublicKey.of(x509.load_der_x509_certificate(certificate).public_key()).text  # type: ignore[arg-type]
    except (ValueError, TypeError, AttributeError):
        return None


def clock() -> str:
    """The server's time, for clients whose clock is wrong (seconds since 1970)."""
    return f"{time.time():.3f}"


def _refused(status: int, reason: str) -> tuple[int, bytes]:
    return status, json.dumps({"detail": printable(reason)}).encode()
