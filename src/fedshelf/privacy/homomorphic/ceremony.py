"""How the keys come to the stores. TenSEAL has no threshold decryption, so the secret key is whole wherever it is.

    server -> stores   KeyContext: run, configuration, who generates the keys (the *holder*), and who may decrypt
    store v: 1  (m, M) <- X25519 key pair;  send KeyRequest(v, M), signed by its identity key
    holder:  2  check the context, and all signatures
             3  (public, secret) <- BFV keys;  k, c <- 32 random bytes each;  (h, H) <- X25519 key pair
             4  e <- AES-256-GCM(k; secret)         only if every store may decrypt
             5  send PublishedKeys(H, public, e), signed by its identity key
             6  for each v: w_v <- AES-256-GCM(HKDF(X25519(h, M_v)); c, k);  k only if every store may decrypt
    store v: 7  check the context and the holder's signature;  c, k <- w_v;  secret <- e

The *check key* c is for `sum_check`; all stores have it, and the server does not. If one store decrypts, it is the
holder, and the secret key never leaves it. All keys are in memory only: a store that restarts sends a new request, and
a holder that restarts begins a new ceremony, with the next attempt.

Every signature and every derived key is bound to the context, so messages of another run, configuration or attempt are
refused. w_v is bound to M_v, which is new each time, and to all that the holder has published.
"""

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedshelf.core.errors import RefusedError
from fedshelf.core.text import printable
from fedshelf.identity.keys import KeyPair
from fedshelf.privacy.homomorphic import seal
from fedshelf.privacy.homomorphic.ciphertexts import Coefficients, from_bytes, to_bytes
from fedshelf.privacy.homomorphic.parameters import COEFFICIENT_BYTES, PARAMETERS
from fedshelf.privacy.secure_aggregation.context import digest, packed
from fedshelf.privacy.secure_aggregation.keys import KEY_BYTES, Identities, agree
from fedshelf.privacy.secure_aggregation.masks import derive

_NONCE = bytes(12)  # every key seals one message only
_SEALING_BYTES = 16
_POLYNOMIAL_BYTES = PARAMETERS.degree * COEFFICIENT_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyContext:
    """The server's announcement of a ceremony.

    Attributes:
        run_id: the run.
        config: digest of the run's configuration.
        attempt: counts the ceremonies of the run.
        sizes: bits and number of values of each vector that is encrypted.
        summands: how many uploads can be added.
        holder: the store that generates the keys.
        is_shared: whether every store may decrypt; otherwise the holder alone.
    """

    run_id: str
    config: str
    attempt: int
    sizes: tuple[tuple[int, int], ...]
    summands: int
    holder: str
    is_shared: bool

    @property
    def digest(self) -> bytes:
        """Identifies the context, and the parameters of BFV."""
        sizes = [number for pair in self.sizes for number in pair]
        return digest(
            "he context", PARAMETERS.digest, self.run_id, self.config, self.attempt, self.summands, self.holder,
            int(self.is_shared), *sizes,
        )  # fmt: skip

    def check(self, known: "KeyContext") -> None:
        """Compare with what a store knows itself, but for the attempt.

        Args:
            known: from the run that it takes part in.

        Raises:
            RefusedError: something differs, or the attempt is an earlier one.
        """
        names = ("run_id", "config", "sizes", "summands", "holder", "is_shared")
        others = [name for name in names if getattr(self, name) != getattr(known, name)]
        if others:
            raise RefusedError(f"the server asks for encryption with another {', '.join(others)} than this run's")
        if self.attempt < known.attempt:
            raise RefusedError(f"key ceremony {self.attempt} is over: this store has seen number {known.attempt}")


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRequest:
    """A store's request for the keys.

    Attributes:
        member: its name.
        context: digest of the context.
        wrap_key: M, an X25519 public key.
        signature: by the store's identity key (DER); empty without identity keys.
    """

    member: str
    context: bytes
    wrap_key: bytes
    signature: bytes = b""

    def content(self) -> bytes:
        """What the signature covers."""
        return packed("he request", self.context, self.member, self.wrap_key)


@dataclass(frozen=True, kw_only=True)
class PublishedKeys:
    """What the holder shows to all.

    Attributes:
        holder: its name.
        context: digest of the context.
        wrap_key: H, an X25519 public key.
        public_key: of BFV, 6 bytes per coefficient.
        sealed_secret: e; empty if the holder alone decrypts.
        signature: by the holder's identity key (DER); empty without identity keys.
    """

    holder: str
    context: bytes
    wrap_key: bytes
    public_key: bytes
    sealed_secret: bytes
    signature: bytes = b""

    @cached_property
    def content(self) -> bytes:
        """What the signature covers."""
        return packed(
            "he keys", self.context, self.holder, self.wrap_key, hashlib.sha256(self.public_key).digest(),
            hashlib.sha256(self.sealed_secret).digest(),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreKeys:
    """What a store has after the ceremony. In memory only.

    Attributes:
        context: digest of the context.
        public: the public key of BFV.
        check_key: c.
        secret: the secret key of BFV; None if the store cannot decrypt.
    """

    context: bytes
    public: Coefficients = field(repr=False)
    check_key: bytes = field(repr=False)
    secret: Coefficients | None = field(repr=False)


class KeyHolder:
    """The store that generates the keys: lines 2 to 6.

    Args:
        context: of the ceremony, checked.
        identity: the store's identity key; None: nothing is signed.
        identities: identity keys of the roster.
    """

    def __init__(self, context: KeyContext, *, identity: KeyPair | None, identities: Identities | None) -> None:
        self._context, self._identities = context, identities
        self._bfv, self._wrap_key = seal.generate(PARAMETERS), X25519PrivateKey.generate()
        self._content_key, self._check_key = secrets.token_bytes(KEY_BYTES), secrets.token_bytes(KEY_BYTES)
        public = to_bytes(self._bfv.public).tobytes()
        secret = to_bytes(self._bfv.secret).tobytes() if context.is_shared else b""
        shown = PublishedKeys(
            holder=context.holder, context=context.digest, wrap_key=self._wrap_key.public_key().public_bytes_raw(),
            public_key=public, sealed_secret=_sealed_secret(self._content_key, secret, context.digest),
        )  # fmt: skip
        self.published = shown if identity is None else replace(shown, signature=identity.sign(shown.content))

    @property
    def keys(self) -> StoreKeys:
        """The holder's own keys."""
        return StoreKeys(
            context=self._context.digest, public=self._bfv.public, check_key=self._check_key, secret=self._bfv.secret
        )

    def wrap(self, request: KeyRequest) -> bytes:
        """Answer a store's request. May be asked at any time, for stores that join later or restart.

        Args:
            request: of any origin.

        Returns:
            w_v.

        Raises:
            RefusedError: it is not a request of a store of the roster for these keys.
        """
        who = printable(request.member)
        if request.context != self._context.digest:
            raise RefusedError(f"the key request of '{who}' is for another run, configuration or ceremony")
        _check_signature(self._identities, request.member, request.signature, request.content(), "key request")
        secret = self._check_key + (self._content_key if self._context.is_shared else b"")
        return _wrapping(self._wrap_key, request.wrap_key, self.published, request).encrypt(_NONCE, secret, None)


class KeyMember:
    """A store that receives the keys: lines 1 and 7.

    Args:
        member: its name.
        context: of the ceremony, checked.
        identity: its identity key; None: nothing is signed.
        identities: identity keys of the roster.
    """

    def __init__(
        self, member: str, context: KeyContext, *, identity: KeyPair | None, identities: Identities | None
    ) -> None:
        self._context, self._identities = context, identities
        self._wrap_key = X25519PrivateKey.generate()
        request = KeyRequest(
            member=member, context=context.digest, wrap_key=self._wrap_key.public_key().public_bytes_raw()
        )
        self.request = request if identity is None else replace(request, signature=identity.sign(request.content()))

    def receive(self, published: PublishedKeys, wrapped: bytes) -> StoreKeys:
        """Line 7.

        Args:
            published: of any origin.
            wrapped: w_v, of any origin.

        Raises:
            RefusedError: these are not the holder's keys for this ceremony and store.
        """
        if published.context != self._context.digest or published.holder != self._context.holder:
            raise RefusedError("the encryption keys are for another run, configuration, ceremony or holder")
        _check_signature(self._identities, published.holder, published.signature, published.content, "encryption keys")
        public = _coefficients(published.public_key, 4, what="the public key for encryption")
        is_shared = self._context.is_shared
        _check_length(wrapped, KEY_BYTES * (1 + is_shared) + _SEALING_BYTES, "the wrapped key")
        sealed_bytes = 2 * _POLYNOMIAL_BYTES + _SEALING_BYTES if is_shared else 0
        _check_length(published.sealed_secret, sealed_bytes, "the sealed secret key")
        keys = _wrapping(self._wrap_key, published.wrap_key, published, self.request)
        try:
            content = keys.decrypt(_NONCE, wrapped, None)
            found = content[KEY_BYTES:] and _opened_secret(content[KEY_BYTES:], published)
        except InvalidTag:
            raise RefusedError(
                "the encryption keys cannot be opened: they are not the holder's for this store and request"
            ) from None
        secret = _coefficients(found, 2, what="the secret key") if is_shared else None
        return StoreKeys(
            context=self._context.digest, public=public, check_key=content[:KEY_BYTES], secret=secret
        )  # fmt: skip


def check_requests(requests: Mapping[str, KeyRequest]) -> None:
    """Check that no key is there twice: one store could stand for two.

    Raises:
        RefusedError: it is, or a request is another store's.
    """
    if any(name != request.member for name, request in requests.items()):
        raise RefusedError("a key request was sent by another store than the one it names")
    if len({request.wrap_key for request in requests.values()}) < len(requests):
        raise RefusedError("two key requests have the same key: one store could stand for two")


def _check_signature(identities: Identities | None, member: str, signature: bytes, content: bytes, what: str) -> None:
    if identities is None:
        return
    identity = identities.get(member)
    if identity is None:
        raise RefusedError(f"'{printable(member)}' is not in the chain's roster: its {what} may be invented")
    if not identity.verifies(signature, content):
        raise RefusedError(f"{what} of '{printable(member)}': not signed by its identity key")


def _wrapping(private: X25519PrivateKey, public: bytes, published: PublishedKeys, request: KeyRequest) -> AESGCM:
    """The cipher between the holder and a store."""
    _check_length(public, KEY_BYTES, "a wrap key")
    return AESGCM(derive(agree(private, public), packed("he wrap", published.content, request.content())))


def _sealed_secret(key: bytes, secret: bytes, context: bytes) -> bytes:
    return secret and AESGCM(key).encrypt(_NONCE, secret, packed("he secret", context))


def _opened_secret(key: bytes, published: PublishedKeys) -> bytes:
    return AESGCM(key).decrypt(_NONCE, published.sealed_secret, packed("he secret", published.context))


def _coefficients(content: bytes, polynomials: int, *, what: str) -> Coefficients:
    """Polynomials modulo q, q', q, q' …"""
    size = _POLYNOMIAL_BYTES
    _check_length(content, polynomials * size, what)
    numbers = np.frombuffer(content, np.uint8).reshape(polynomials, size)
    primes = PARAMETERS.primes * (polynomials // 2)
    return np.concatenate([from_bytes(row, prime, what=what) for row, prime in zip(numbers, primes, strict=True)])


def _check_length(content: bytes, wanted: int, what: str) -> None:
    if len(content) != wanted:
        raise RefusedError(f"{what} has {len(content):,} bytes instead of {wanted:,}")
