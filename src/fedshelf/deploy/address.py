"""Network addresses as people type them: HOST:PORT, with brackets around an IPv6 host."""

from dataclasses import dataclass

from fedshelf.core.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """A host (name or IP address, without brackets) and a TCP port; port 0 means "any free one" to a server."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Read ``HOST:PORT`` or ``[IPv6]:PORT``.

    Raises:
        UsageError: says what is wrong with `text` and shows an address that would do.
    """
    example = "write HOST:PORT, for example 192.168.1.100:8080 or [fe80::1]:8080"
    if "://" in text:
        raise UsageError(f"address {text!r} is a URL: {example}")
    host, colon, port = text.strip().rpartition(":")
    if not colon or not host:
        raise UsageError(f"address {text!r} lacks a host or a port: {example}")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise UsageError(f"address {text!r} has an IPv6 host without brackets: {example}")
    if not host or any(character in host for character in "[]/@ "):
        raise UsageError(f"address {text!r} has no valid host: {example}")
    if not (port.isascii() and port.isdecimal() and int(port) <= 65535):
        raise UsageError(f"address {text!r} has no valid port (a number from 0 to 65535): {example}")
    return Address(host=host, port=int(port))
