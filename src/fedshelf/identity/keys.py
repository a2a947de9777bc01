"""Long-lived key pairs: ECDSA over P-256 (FIPS 186-5), as TLS certificates need them, too.

A key is made where it is used and never leaves that machine. It is stored in a file with mode 0600.
"""

import os
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedshelf.core.errors import IdentityFileError
from fedshelf.storage.atomic_files import translating_os_errors, write_atomically

PASSPHRASE_VARIABLE = "FEDSHELF_PASSPHRASE"  # noqa: S105 the name of a variable
_CURVE, _HASH = ec.SECP256R1(), ec.ECDSA(hashes.SHA256())
_PUBLIC_CHARACTERS = 44  # of a compressed point of 33 bytes


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key.

    Attributes:
        text: the compressed point in URL-safe base64, 44 characters; unique for each key.
    """

    text: str

    @classmethod
    def of(cls, key: ec.EllipticCurvePublicKey) -> "PublicKey":
        """Create an instance from a key of the `cryptography` library."""
        point = key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)
        return cls(text_of(point))

    def verifies(self, signature: bytes, content: bytes) -> bool:
        """Whether `signature` (DER) of `content` is this key's."""
        try:
            _loaded(self.text).verify(signature, content, _HASH)
        except (InvalidSignature, ValueError):
            return False
        return True

    @property
    def is_valid(self) -> bool:
        """Whether the text is a point of the curve, in its only form."""
        try:
            return len(self.text) == _PUBLIC_CHARACTERS and PublicKey.of(_loaded(self.text)) == self
        except ValueError:
            return False


class KeyPair:
    """A private key and its public key.

    Args:
        private: the private key.

    Attributes:
        private: the private key, for certificates.
        public: the public key.
    """

    def __init__(self, private: ec.EllipticCurvePrivateKey) -> None:
        self.private = private
        self.public = PublicKey.of(private.public_key())

    @classmethod
    def generate(cls) -> "KeyPair":
        """Make a new key pair, from the system's random number generator."""
        return cls(ec.generate_private_key(_CURVE))

    @classmethod
    def load(cls, path: Path, *, passphrase: bytes | None = None) -> "KeyPair":
        """Read a key pair.

        Args:
            path: a PEM file.
            passphrase: decrypts it, if it is encrypted.

        Raises:
            RunError: the file cannot be read.
            IdentityError: it does not hold such a key, or the passphrase is missing or wrong.
        """
        with translating_os_errors("read", path):
            pem = path.read_bytes()
        try:
            return cls(private_key(pem, passphrase))
        except TypeError as error:
            raise passphrase_problem(path, passphrase) from error
        except ValueError as error:
            raise IdentityFileError(
                f"'{path}' does not hold a key that can be read: restore it from a backup"
                + (f", and check {PASSPHRASE_VARIABLE}" if passphrase else "")
            ) from error

    def save(self, path: Path, *, passphrase: bytes | None = None) -> None:
        """Write the key pair with mode 0600, encrypted if there is a passphrase.

        Raises:
            RunError: the file cannot be written.
        """
        write_atomically(path, self.pem(passphrase))

    def pem(self, passphrase: bytes | None = None) -> bytes:
        """The private key (PEM), encrypted if there is a passphrase."""
        encryption: serialization.KeySerializationEncryption = (
            serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
        )
        return self.private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)

    def sign(self, content: bytes) -> bytes:
        """Sign `content`.

        Returns:
            The signature (DER).
        """
        return self.private.sign(content, _HASH)


def private_key(pem: bytes, passphrase: bytes | None = None) -> ec.EllipticCurvePrivateKey:
    """Parse a private key.

    Raises:
        ValueError: it is not a P-256 key.
        TypeError: a passphrase is missing or superfluous.
    """
    key = serialization.load_pem_private_key(pem, passphrase)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("not a P-256 key")
    return key


def passphrase_problem(path: Path, given: bytes | None) -> IdentityFileError:
    """The error for a key that is encrypted without a passphrase, or the reverse."""
    problem, advice = ("is encrypted", "set") if given is None else ("is not encrypted", "unset")
    return IdentityFileError(f"'{path}' {problem}: {advice} {PASSPHRASE_VARIABLE}")


def passphrase() -> bytes | None:
    """The passphrase of the server's keys from the environment, if there is one."""
    return os.environ.get(PASSPHRASE_VARIABLE, "").encode() or None


def text_of(content: bytes) -> str:
    """URL-safe base64 without padding."""
    return urlsafe_b64encode(content).decode("ascii").rstrip("=")


def bytes_of(text: str) -> bytes:
    """The reverse of `text_of`.

    Raises:
        ValueError: `text` is not base64.
    """
    return urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))


@lru_cache(maxsize=4096)
def _loaded(text: str) -> ec.EllipticCurvePublicKey:
    return ec.EllipticCurvePublicKey.from_encoded_point(_CURVE, bytes_of(text))
