"""The boundary to TenSEAL, which contains SEAL: keys, encryption, and decryption.

Keys and ciphertexts are vectors of coefficients outside of this module. TenSEAL takes and gives them as protobuf
messages that hold SEAL's streams. Both parsers are C++ that was not written for hostile input, so they only see what
this module has composed itself: a constant head, that of an object of the same kind which SEAL has made here, followed
by coefficients, all of which are below their modulus.

Randomness is SEAL's: Blake2xb, with a new seed of the operating system for each encryption.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import zstandard

from fedshelf.core.errors import RefusedError, UsageError
from fedshelf.privacy.homomorphic.ciphertexts import Coefficients
from fedshelf.privacy.homomorphic.packing import Slots
from fedshelf.privacy.homomorphic.parameters import Parameters

_HEADER_BYTES, _MAGIC, _MODE, _ZSTD = 16, b"\x5e\xa1\x10", 5, 2  # SEAL's: magic, its length, version, mode, size
_CONTEXT_PARAMETERS, _CONTEXT_PUBLIC, _CONTEXT_PRIVATE = 1, 2, 3  # fields of TenSEAL's messages
_PUBLIC_KEY, _SECRET_KEY, _SIZES, _CIPHERTEXTS = 1, 1, 1, 2


class Heads(NamedTuple):
    """Constant bytes in front of the coefficients of each kind of object, and the encoded parameters."""

    header: bytes
    parameters: bytes
    public_key: bytes
    secret_key: bytes
    ciphertext: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class BfvKeys:
    """A key pair.

    Attributes:
        public: two polynomials modulo q and q' [4 N].
        secret: one polynomial modulo q and q' [2 N].
    """

    public: Coefficients
    secret: Coefficients = field(repr=False)


def require() -> None:
    """Check that the package is there.

    Raises:
        UsageError: it is not.
    """
    _tenseal()


def generate(parameters: Parameters) -> BfvKeys:
    """Make a new key pair."""
    message = _fields(_new_context(parameters).serialize(True, True, False, False))
    public = _fields(message[_CONTEXT_PUBLIC])[_PUBLIC_KEY]
    secret = _fields(message[_CONTEXT_PRIVATE])[_SECRET_KEY]
    return BfvKeys(
        public=_split(public, 4 * parameters.degree)[1].copy(), secret=_split(secret, 2 * parameters.degree)[1].copy()
    )


class Encryptor:
    """Encrypts with a public key.

    Args:
        parameters: of BFV.
        public: the key.
    """

    def __init__(self, parameters: Parameters, public: Coefficients) -> None:
        self._parameters = parameters
        self._context = _context(parameters, public=public)

    def encrypt(self, slots: Slots) -> Coefficients:
        """Encrypt the values of one ciphertext's slots.

        Args:
            slots: [N], of -t/2 to t/2, or of 0 to t.

        Returns:
            Two polynomials modulo q [2 N].
        """
        centered = np.where(slots > self._parameters.plain_modulus // 2, slots - self._parameters.plain_modulus, slots)
        vector = _tenseal().bfv_vector(self._context, centered)
        return _split(_fields(vector.serialize())[_CIPHERTEXTS], 2 * self._parameters.degree)[1]


class Decryptor:
    """Decrypts with a secret key.

    Args:
        parameters: of BFV.
        secret: the key.
    """

    def __init__(self, parameters: Parameters, secret: Coefficients) -> None:
        self._parameters = parameters
        self._context = _context(parameters, secret=secret)
        context, key = self._context.seal_context().data, self._context.secret_key().data
        self._decryptor = _tenseal().sealapi.Decryptor(context, key)

    def decrypt(self, coefficients: Coefficients) -> Slots:
        """Decrypt one ciphertext.

        Args:
            coefficients: two polynomials modulo q [2 N], checked.

        Returns:
            The slots [N], of -t/2 to t/2.

        Raises:
            RefusedError: its noise is too large: it was encrypted with another key, or is not a sum of uploads.
        """
        vector = self._vector(coefficients)
        if self._decryptor.invariant_noise_budget(vector.ciphertext()[0]) < 1:
            raise RefusedError(
                "the encrypted sum cannot be decrypted: its noise is too large. It was encrypted with another key, or "
                "an upload in it is not a proper ciphertext"
            )
        return np.array(vector.decrypt(), np.int64)

    def noise_budget(self, coefficients: Coefficients) -> int:
        """Bits of noise that may still be added to a ciphertext [2 N]."""
        return int(self._decryptor.invariant_noise_budget(self._vector(coefficients).ciphertext()[0]))

    def _vector(self, coefficients: Coefficients) -> Any:
        """A ciphertext of TenSEAL."""
        heads, sizes = _heads(self._parameters), _number(self._parameters.degree)
        stream = _joined(heads.header, heads.ciphertext, coefficients)
        return _tenseal().bfv_vector_from(self._context, _field(_SIZES, sizes) + _field(_CIPHERTEXTS, stream))


def _new_context(parameters: Parameters) -> Any:
    """A context with new keys."""
    tenseal = _tenseal()
    return tenseal.context(
        tenseal.SCHEME_TYPE.BFV, poly_modulus_degree=parameters.degree, plain_modulus=parameters.plain_modulus,
        coeff_mod_bit_sizes=[prime.bit_length() for prime in parameters.primes], n_threads=1,
    )  # fmt: skip


def _context(
    parameters: Parameters, *, public: Coefficients | None = None, secret: Coefficients | None = None
) -> Any:  # fmt: skip
    """A context with these keys alone."""
    heads, message = _heads(parameters), b""
    message += _field(_CONTEXT_PARAMETERS, heads.parameters)
    public_part = b"" if public is None else _field(_PUBLIC_KEY, _joined(heads.header, heads.public_key, public))
    message += _field(_CONTEXT_PUBLIC, public_part)
    if secret is not None:
        private_part = _field(_SECRET_KEY, _joined(heads.header, heads.secret_key, secret))
        message += _field(_CONTEXT_PRIVATE, private_part)
    return _tenseal().context_from(message, n_threads=1)


@cache
def _heads(parameters: Parameters) -> Heads:
    """The constant bytes, of objects that SEAL makes here."""
    context = _new_context(parameters)
    message = _fields(context.serialize(True, True, False, False))
    encoded = message[_CONTEXT_PARAMETERS]
    content = _decompressed(encoded)
    if any(prime.to_bytes(8, "little") not in content for prime in (*parameters.primes, parameters.plain_modulus)):
        raise UsageError("TenSEAL chooses other primes than FedShelf expects: install tenseal 0.3.18")
    ciphertext = _fields(_tenseal().bfv_vector(context, [0] * parameters.degree).serialize())[_CIPHERTEXTS]
    public = _fields(message[_CONTEXT_PUBLIC])[_PUBLIC_KEY]
    secret = _fields(message[_CONTEXT_PRIVATE])[_SECRET_KEY]
    return Heads(
        header=encoded[:_MODE], parameters=encoded, public_key=_split(public, 4 * parameters.degree)[0],
        secret_key=_split(secret, 2 * parameters.degree)[0], ciphertext=_split(ciphertext, 2 * parameters.degree)[0],
    )  # fmt: skip


def _decompressed(stream: bytes) -> bytes:
    """The content of a stream that SEAL has made."""
    if stream[:3] != _MAGIC or stream[_MODE] not in (0, _ZSTD):
        raise UsageError("TenSEAL writes another format than FedShelf knows: install tenseal 0.3.18")
    content = stream[_HEADER_BYTES:]
    return zstandard.ZstdDecompressor().decompressobj().decompress(content) if stream[_MODE] == _ZSTD else content


def _split(stream: bytes, count: int) -> tuple[bytes, Coefficients]:
    """The head, and the coefficients, of a stream that SEAL has made."""
    content = _decompressed(stream)
    return content[: -8 * count], np.frombuffer(content, "<u8", count, len(content) - 8 * count)


def _joined(header: bytes, head: bytes, coefficients: Coefficients) -> bytes:
    """The reverse of `_split`, not compressed."""
    content = head + coefficients.astype("<u8").tobytes()
    size = _HEADER_BYTES + len(content)
    return header + b"\0\0\0" + size.to_bytes(8, "little") + content


def _number(value: int) -> bytes:
    """A protobuf varint."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, content: bytes) -> bytes:
    """A field of a protobuf message, with a length."""
    return _number(number << 3 | 2) + _number(len(content)) + content


def _fields(message: bytes) -> dict[int, bytes]:
    """The fields with a length of a protobuf message that TenSEAL has made; the last of each number."""
    return dict(_each_field(message))


def _each_field(message: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        key = number()
        length = {0: 0, 1: 8, 2: -1}[key & 7]
        if key & 7 == 0:
            number()
        elif length < 0:
            length = number()
            yield key >> 3, message[at : at + length]
        at += length


@cache
def _tenseal() -> ModuleType:
    """Import the package."""
    try:
        import tenseal.sealapi
    except ImportError:
        raise UsageError(
            "homomorphic encryption needs the package tenseal, which is an extra: pip install 'fedshelf[he]'"
        ) from None
    return tenseal  # type: ignore[no-any-return]
