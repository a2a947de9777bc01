"""A client's line to the server: one HTTP connection that stays open, and is opened anew after a break.

The standard library's client is used: it reads into memory that is there already and writes from where the values
lie, and costs a tenth of what the comfortable ones cost for each request.
"""

import contextlib
import http.client
import select
import socket
import ssl
import urllib.parse
import urllib.request
from base64 import b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedshelf.deploy.address import Address

if TYPE_CHECKING:  # its module loads torch, which a crash reporter does without
    from fedshelf.serialization.blob import Buffer

HEADER_NAMES = ("upload-offset", "content-range", "content-length", "date")


class ServerAwayError(Exception):
    """The server cannot be reached for now: try again. Never leaves this room."""


class SessionLostError(Exception):
    """The server answers, but does not know this registration (any more): register anew. Never leaves this room."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the server answered: HTTP status, those of its headers that are read, and the content."""

    status: int
    headers: Mapping[str, str]
    content: bytes


class HttpConnection:
    """One connection; belongs to one thread. What breaks it is a `ServerAwayError`; the next request opens it anew.

    Args:
        address: the server's.
        context: what to check the server's certificate against; None speaks in clear.
        timeout: seconds that the server may be silent.
    """

    def __init__(self, address: Address, context: ssl.SSLContext | None, *, timeout: float) -> None:
        self._connection = _connection(address, context, timeout)

    def request(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None) -> Answer:
        """One request, and its whole answer."""
        response = self.open(method, path, headers, body)
        try:
            return _answer(response, response.read())
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from error

    def open(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> http.client.HTTPResponse:
        """One request; the caller reads the answer's content (`read_into`), to its end or up to a `close`."""
        self._hang_up_if_stale()
        try:
            self._connection.request(method, path, body=body, headers=dict(headers))
            return self._connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from error

    def read_into(self, response: http.client.HTTPResponse, target: memoryview) -> int:
        """Read on into `target`: the number of bytes, 0 at the end."""
        try:
            return response.readinto(target)
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from error

    def send(self, method: str, path: str, headers: Mapping[str, str], pieces: "Iterable[Buffer]") -> Answer:
        """A request whose body is `pieces`; `headers` say its length."""
        self._hang_up_if_stale()
        try:
            self._connection.putrequest(method, path)
            for name, value in headers.items():
                self._connection.putheader(name, value)
            self._connection.endheaders()
            for piece in pieces:
                self._connection.send(piece)
            response = self._connection.getresponse()
            return _answer(response, response.read())
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from error

    def close(self) -> None:
        """Also wakes another thread that waits for an answer here."""
        sock = self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # below TLS, whose state the other thread may be using
        self._connection.close()

    def _hang_up_if_stale(self) -> None:
        """Between requests nothing arrives but the end: the server closes what has been idle for a while."""
        sock = self._connection.sock
        if sock is not None and _is_readable(sock):
            self._connection.close()

    def _broken(self, error: Exception) -> ServerAwayError:
        self._connection.close()
        return ServerAwayError(str(error) or type(error).__name__)


def _answer(response: http.client.HTTPResponse, content: bytes) -> Answer:
    headers = {name: value for name in HEADER_NAMES if (value := response.getheader(name)) is not None}
    return Answer(status=response.status, headers=headers, content=content)


def _is_readable(sock: socket.socket) -> bool:
    watch = select.poll()
    watch.register(sock, select.POLLIN)
    return bool(watch.poll(0))


def _connection(address: Address, context: ssl.SSLContext | None, timeout: float) -> http.client.HTTPConnection:
    """A connection to `address`, through the proxy that the environment names for it, if any (`HTTPS_PROXY`)."""
    proxy = _proxy(address, "http" if context is None else "https")
    host, port = (address.host, address.port) if proxy is None else (proxy.hostname or "", proxy.port or 8080)
    made = (
        http.client.HTTPConnection(host, port, timeout=timeout)
        if context is None
        else http.client.HTTPSConnection(host, port, timeout=timeout, context=context)
    )
    if proxy is not None:
        secret = f"{urllib.parse.unquote(proxy.username or '')}:{urllib.parse.unquote(proxy.password or '')}"
        credentials = {"Proxy-Authorization": f"Basic {b64encode(secret.encode()).decode()}"} if proxy.username else {}
        made.set_tunnel(address.host, address.port, headers=credentials)
    return made


def _proxy(address: Address, scheme: str) -> urllib.parse.SplitResult | None:
    proxies = urllib.request.getproxies()
    url = proxies.get(scheme) or proxies.get("all")
    if not url or urllib.request.proxy_bypass(address.host):
        return None
    return urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
