"""Network addresses in the form HOST:PORT, with brackets around an IPv6 host."""

import ipaddress
import socket
from dataclasses import dataclass
from typing import TypeAlias

import psutil

from fedshelf.core.errors import UsageError

IP: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

EXAMPLE = "write HOST:PORT, for example 192.168.1.100:8080 or [2001:db8::1]:8080"
DOCUMENTATION_ADDRESSES = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}  # unassigned (RFC 5737, 3849)


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """A host and a port.

    Attributes:
        host: a name or an IP address, without brackets.
        port: a TCP port; 0 lets a server choose a free one.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_wildcard(self) -> bool:
        """Whether the address stands for all interfaces, which only a server can use."""
        ip = parse_ip(self.host)
        return self.host in ("", "*") or (ip is not None and ip.is_unspecified)

    @property
    def is_loopback(self) -> bool:
        """Whether the address refers to this machine only."""
        ip = parse_ip(self.host)
        return ip.is_loopback if ip is not None else f".{self.host.lower()}".endswith(".localhost")


def parse_address(text: str, *, default_port: int | None = None) -> Address:
    """Parse ``HOST:PORT`` or ``[IPv6]:PORT``.

    Args:
        text: the user's input.
        default_port: the port to use when `text` has none; None makes the port mandatory.

    Returns:
        The address, without a trailing dot in the host name.

    Raises:
        UsageError: `text` is invalid; the message includes a valid example.
    """
    if "://" in text:
        raise UsageError(f"address {text!r} is a URL: {EXAMPLE}")
    if default_port is not None and (":" not in text or parse_ip(text) or text.endswith("]")):
        text = str(Address(host=text.strip().removeprefix("[").removesuffix("]"), port=default_port))
    if text.count("[") != text.count("]"):
        raise UsageError(f"address {text!r} has only one of the two brackets of an IPv6 host: {EXAMPLE}")
    host, colon, port = text.strip().rpartition(":")
    if port.endswith("]"):
        host = ""
    if not colon or not host:
        raise UsageError(f"address {text!r} lacks a host or a port: {EXAMPLE}")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise UsageError(f"address {text!r} has an IPv6 host without brackets: {EXAMPLE}")
    if problem := host_problem(host):
        raise UsageError(f"address {text!r} has no valid host ({problem}): {EXAMPLE}")
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) <= 65535):
        raise UsageError(f"address {text!r} has no valid port (a number from 0 to 65535): {EXAMPLE}")
    return Address(host=host.removesuffix("."), port=int(port))


def parse_server_address(text: str) -> Address:
    """Parse the address that a client connects to.

    Args:
        text: the user's input.

    Returns:
        The address.

    Raises:
        UsageError: `text` is invalid, or is an address that only a server can use.
    """
    address = parse_address(text)
    if address.is_wildcard or address.port == 0:
        raise UsageError(
            f"--server-address {text} is what a server listens on (any address, or any port), not where a client "
            f"finds it: give the server's name or IP address; the server prints it when it starts ({EXAMPLE})"
        )
    return address


def parse_advertised(text: str, listen: Address) -> Address:
    """Parse the address that a server advertises: ``HOST`` or ``HOST:PORT``.

    Args:
        text: the user's input.
        listen: the address the server listens on; its port is the default.

    Returns:
        The address.

    Raises:
        UsageError: `text` is invalid, or is an address that clients cannot connect to.
    """
    try:
        address = parse_address(text, default_port=listen.port)
    except UsageError as error:
        raise UsageError(f"--advertise: {error}") from None
    if address.is_wildcard:
        raise UsageError(f"--advertise {text} is not an address that clients can connect to: give a name or IP address")
    return address


def parse_ip(host: str) -> IP | None:
    """Parse an IP address in any notation that the system accepts.

    Args:
        host: a name or an IP address, without brackets.

    Returns:
        The IP address, or None if `host` is a name.
    """
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))  # 127.1, 0
        except (OSError, ValueError):
            return None
    return getattr(ip, "ipv4_mapped", None) or ip


def own_addresses() -> list[str]:
    """Return this machine's IP addresses, sorted, without link-local ones that name an interface."""
    try:
        entries = [entry for interface in psutil.net_if_addrs().values() for entry in interface]
    except OSError:  # some sandboxes deny this
        return []
    found = {entry.address for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)}
    return sorted(address for address in found if "%" not in address)


def reachable_address(listen: Address) -> Address:
    """Guess the address at which clients can reach a server on this machine.

    Args:
        listen: the address the server listens on.

    Returns:
        `listen`, or for a wildcard the source address of this machine's default route.
    """
    if not listen.is_wildcard:
        return listen
    for family, target in DOCUMENTATION_ADDRESSES.items():
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((target, 9))  # selects a route; sends nothing
                return Address(host=probe.getsockname()[0], port=listen.port)
        except OSError:
            continue
    others = [host for host in own_addresses() if not Address(host=host, port=0).is_loopback]
    return Address(host=others[0] if others else "127.0.0.1", port=listen.port)


def host_problem(host: str) -> str:
    """Explain why a host name or address is invalid.

    Args:
        host: a name or an IP address, without brackets.

    Returns:
        The reason as a sentence fragment, or an empty string if `host` is valid.
    """
    if not host or not host.isprintable() or any(character in host for character in "[]/@ "):
        return "a character that no host name has" if host else "it is empty"
    labels = host.removesuffix(".").split(".")
    if parse_ip(host) is None:
        if not all(labels):
            return "nothing stands between two of its dots"
        if max(map(len, labels)) > 63 or len(host) > 253:
            return "more than 63 characters between dots, or 253 in all"
        try:
            host.encode("idna")
        except UnicodeError:
            return "the name system cannot express it"
    return ""
