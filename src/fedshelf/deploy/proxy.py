"""The HTTP proxy for a server, from environment variables such as `HTTPS_PROXY` and `NO_PROXY`."""

import ipaddress
import os
import re
import urllib.parse
from base64 import b64encode
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from fedshelf.core.errors import TransportError, UsageError
from fedshelf.deploy.address import IP, Address, parse_address, parse_ip

DEFAULT_PORT = 80  # of an http:// URL
_WITH_PORT = re.compile(r"([^:]*|\[.*\]):([0-9]{1,5})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Proxy:
    """A proxy that opens tunnels with `CONNECT`.

    Attributes:
        address: the proxy's address.
        variable: the environment variable that names it.
        headers: authorization for the proxy; secret.
    """

    address: Address
    variable: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return f"the proxy {self.address} ({self.variable})"


def proxy_for(server: Address, *, encrypted: bool, environment: Mapping[str, str] = os.environ) -> Proxy | None:
    """Find the proxy for a server. A server on this machine is always reached directly.

    Args:
        server: the server's address.
        encrypted: whether TLS is used: selects `HTTPS_PROXY` if so, else `HTTP_PROXY`; `ALL_PROXY` applies to both.
        environment: the variables, in lower or upper case.

    Returns:
        The proxy, or None for a direct connection.

    Raises:
        TransportError: the variable is not the URL of an HTTP proxy. The message does not repeat it, as it may contain
            a password.
    """
    scheme = "https" if encrypted else "http"
    names = [name for part in (scheme, "all") for name in (f"{part}_proxy", f"{part}_proxy".upper())]
    variable = next((name for name in names if environment.get(name, "").strip()), None)
    exceptions = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    if variable is None or server.is_loopback or _is_excepted(server, exceptions):
        return None
    return _parse(environment[variable].strip(), variable)


def _parse(url: str, variable: str) -> Proxy:
    try:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        port = DEFAULT_PORT if parts.port is None else parts.port
        address = parse_address(str(Address(host=parts.hostname or "", port=port)))
        is_valid = parts.path in ("", "/") and not (parts.query or parts.fragment)
    except (ValueError, UsageError):
        is_valid = False
    if not is_valid:
        raise TransportError(
            f"the environment variable {variable} does not hold a valid proxy URL (not repeated here, as it may hold a "
            "password): write http://HOST:PORT or http://USER:PASSWORD@HOST:PORT, with special characters of user and "
            "password percent-encoded (# as %23, / as %2F, @ as %40)"
        )
    if parts.scheme != "http":
        raise TransportError(
            f"the environment variable {variable} names a proxy of the kind {parts.scheme}://; FedShelf connects "
            "through HTTP proxies (http://HOST:PORT): name one, or list the server's host in NO_PROXY"
        )
    if parts.username is None:
        return Proxy(address=address, variable=variable)
    secret = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
    headers = {"Proxy-Authorization": f"Basic {b64encode(secret.encode()).decode()}"}
    return Proxy(address=address, variable=variable, headers=headers)


def _is_excepted(server: Address, exceptions: str) -> bool:
    """Whether `NO_PROXY` matches the server.

    An entry is `*`, a host, a domain including its subdomains, an IP address, or a network in CIDR notation; each may
    have a port.
    """
    host, ip = server.host.lower(), parse_ip(server.host)
    for part in re.split(r"[,\s]+", exceptions.lower()):
        match = _WITH_PORT.fullmatch(part)
        if match is not None and int(match[2]) != server.port:
            continue
        entry = (match[1] if match is not None else part).removeprefix("[").removesuffix("]")
        domain = entry.removeprefix("*").removeprefix(".")
        if entry == "*" or (ip is None and domain and f".{host}".endswith(f".{domain}")):
            return True
        if ip is not None and (parse_ip(entry) == ip or ip in _network(entry)):
            return True
    return False


def _network(entry: str) -> Container[IP]:
    try:
        return ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return ()
