"""Tokens: what a store needs to enroll, in one line of text.

A token carries the server's addresses, the SHA-256 fingerprint of its certificate authority, a secret, and when it
expires. It is worthless once it has been used or has expired, so it may pass through a mail or a command line.
"""

import datetime
import hashlib
import json
import secrets
from dataclasses import dataclass

from fedshelf.core.errors import IdentityError
from fedshelf.identity.keys import bytes_of, text_of

PREFIX = "fedshelf1."
_SECRET_BYTES = 18
_MAX_CHARACTERS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """A token.

    Attributes:
        addresses: HOST:PORT of the server, in order of preference.
        authority: SHA-256 of the authority's certificate (DER, hex); "" if the server's certificate is checked against
            the system's authorities, or there is no TLS.
        secret: what the server recognizes.
        expires: when it expires.
        name: the store that it is for; "" for an invitation that any store may use.
    """

    addresses: tuple[str, ...]
    authority: str
    secret: str
    expires: datetime.datetime
    name: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 of the secret (hex)."""
        return digest_of(self.secret)

    def __str__(self) -> str:
        """The token's text."""
        fields = {
            "a": list(self.addresses), "c": self.authority, "s": self.secret, "e": int(self.expires.timestamp()),
            "n": self.name,
        }  # fmt: skip
        return PREFIX + text_of(json.dumps(fields, separators=(",", ":")).encode())

    @classmethod
    def parse(cls, text: str) -> "Token":
        """Read a token's text.

        Raises:
            IdentityError: it is not a token, or is not whole. The message does not contain it.
        """
        text = "".join(text.split())  # mail programs break long lines
        try:
            if not text.startswith(PREFIX) or len(text) > _MAX_CHARACTERS:
                raise ValueError
            fields = json.loads(bytes_of(text.removeprefix(PREFIX)))
            return cls(
                addresses=tuple(str(address) for address in fields["a"]), authority=str(fields["c"]),
                secret=str(fields["s"]), expires=datetime.datetime.fromtimestamp(int(fields["e"]), datetime.UTC),
                name=str(fields["n"]),
            )  # fmt: skip
        except (ValueError, KeyError, TypeError, OverflowError, OSError, RecursionError):
            raise IdentityError(
                "the token is incomplete or was changed: paste the whole token, from "
                f"{PREFIX} to its last character, as 'fedshelf enroll add' or 'fedshelf server' printed it"
            ) from None


def digest_of(secret: str) -> str:
    """SHA-256 of a token's secret (hex), by which it is recognized."""
    return hashlib.sha256(secret.encode()).hexdigest()


def new_secret() -> str:
    """A secret for a token, from the system's random number generator."""
    return text_of(secrets.token_bytes(_SECRET_BYTES))
