"""Signed requests: which store sends a request, when, to which server, and with which body.

The signature covers method, path, the body's digest, the time, a nonce, the session, and the fingerprint of the
server's certificate. A request that is recorded cannot be sent again: its nonce is known. It cannot be sent later: its
time has passed. It cannot be passed on to another server: that has another certificate.
"""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from fedshelf.identity.keys import KeyPair, PublicKey, bytes_of, text_of

WINDOW_SECONDS = 60.0
"""How far a request's time may be from the server's."""

KEY, SESSION, TIME, NONCE, DIGEST, SIGNATURE = (
    f"fedshelf-{name}" for name in ("key", "session", "time", "nonce", "digest", "signature")
)
NO_BODY = hashlib.sha256(b"").hexdigest()
UNSIGNED_BODY = "in-path"
"""Digest of a body that the path names by its own digest."""

_CONTEXT = "fedshelf request 1"
_MOST_NONCES = 1 << 17


@dataclass(frozen=True, kw_only=True, slots=True)
class SignedRequest:
    """What a signature covers.

    Attributes:
        method: the HTTP method.
        path: the path.
        digest: SHA-256 of the body (hex), or `UNSIGNED_BODY`.
        session: the session that the request belongs to.
        time: seconds since 1970, by the server's clock.
        nonce: a different text for each request of the key.
        server: SHA-256 of the server's certificate (hex); "" without TLS.
    """

    method: str
    path: str
    digest: str
    session: str
    time: float
    nonce: str
    server: str

    def signed_by(self, keys: KeyPair) -> Mapping[str, str]:
        """The headers of the request."""
        return {
            KEY: keys.public.text, SESSION: self.session, TIME: f"{self.time:.3f}", NONCE: self.nonce,
            DIGEST: self.digest, SIGNATURE: text_of(keys.sign(self._content())),
        }  # fmt: skip

    def is_signed(self, key: PublicKey, signature: str) -> bool:
        """Whether `signature` is that of `key`."""
        try:
            return key.verifies(bytes_of(signature), self._content())
        except ValueError:
            return False

    def _content(self) -> bytes:
        fields = (
            _CONTEXT, self.method, self.path, self.digest, self.session, f"{self.time:.3f}", self.nonce, self.server,
        )  # fmt: skip
        return "\n".join(fields).encode()


class Nonces:
    """The nonces of the last two minutes. Thread-safe."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._lock = threading.Lock()

    def is_new(self, key: str, nonce: str) -> bool:
        """Whether `key` has not used `nonce` yet; it has from now on."""
        now = time.monotonic()
        with self._lock:
            while self._seen and (
                len(self._seen) >= _MOST_NONCES or next(iter(self._seen.values())) < now - 2 * WINDOW_SECONDS
            ):
                self._seen.popitem(last=False)
            if (key, nonce) in self._seen:
                return False
            self._seen[key, nonce] = now
            return True
