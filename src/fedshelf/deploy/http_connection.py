"""A client's persistent HTTP connection to the server, reopened after a break.

It uses the standard library's client, which reads into existing memory, sends directly from the tensors, and costs a
tenth per request of what higher-level clients do.
"""

import contextlib
import hashlib
import http.client
import select
import socket
import ssl
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedshelf.core.errors import TransportError
from fedshelf.deploy import connection_errors
from fedshelf.deploy.address import Address
from fedshelf.deploy.proxy import Proxy, proxy_for

if TYPE_CHECKING:  # this module loads torch, which a crash reporter does not need
    from fedshelf.serialization.blob import Buffer

HEADER_NAMES = ("upload-offset", "content-range", "content-length", "date")
MAX_ANSWER_BYTES = 16 << 20  # of a response other than a model: the same as a server accepts
MAX_INTERIM_RESPONSES = 16
PROBE_SECONDS = 5.0  # maximum wait for a server's certificate when diagnosing a failure


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The server's response.

    Attributes:
        status: the HTTP status.
        headers: the headers listed in `HEADER_NAMES`.
        content: the body.
    """

    status: int
    headers: Mapping[str, str]
    content: bytes


class HttpConnection:
    """One connection, used by one thread. After a break, the next request reopens it.

    Every method raises `ServerUnavailableError` if retrying may help, and `TransportError` if it will not.

    Args:
        address: the server's address.
        context: the TLS settings to check the server's certificate against; None disables TLS.
        timeout: seconds that the server may be silent.

    Raises:
        TransportError: the proxy URL in the environment is invalid.
    """

    def __init__(self, address: Address, context: ssl.SSLContext | None, *, timeout: float) -> None:
        self._address = address
        proxy = proxy_for(address, encrypted=context is not None)
        self._connection = _Connection(address, context, proxy, timeout)

    def request(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None) -> Answer:
        """Send a request and read the whole response, of at most `MAX_ANSWER_BYTES`."""
        response = self.open(method, path, headers, body)
        with self._translating():
            return _answer(response)

    def open(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> http.client.HTTPResponse:
        """Send a request whose response the caller reads with `read_into`, to its end or until `close`."""
        self._make_ready()
        with self._translating():
            self._connection.request(method, path, body=body, headers=dict(headers))
            return self._connection.getresponse()

    def read_into(self, response: http.client.HTTPResponse, target: memoryview) -> int:
        """Read into `target`; return the number of bytes, 0 at the end."""
        with self._translating():
            return response.readinto(target)

    def send(self, method: str, path: str, headers: Mapping[str, str], pieces: "Iterable[Buffer]") -> Answer:
        """Send a request whose body is `pieces`; `headers` must include its length."""
        self._make_ready()
        with self._translating():
            self._connection.putrequest(method, path)
            for name, value in headers.items():
                self._connection.putheader(name, value)
            self._connection.endheaders()
            for piece in pieces:
                self._connection.send(piece)
            return _answer(self._connection.getresponse())

    def close(self) -> None:
        """Close the connection; wakes another thread that waits on it."""
        sock = self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # below TLS, whose state the other thread may be using
        self._connection.close()

    def server_fingerprint(self) -> str:
        """SHA-256 of the server's certificate (hex) on the open connection; "" without TLS."""
        sock = self._connection.sock
        certificate = sock.getpeercert(binary_form=True) if isinstance(sock, ssl.SSLSocket) else None
        return hashlib.sha256(certificate).hexdigest() if certificate else ""

    def speaks_tls(self) -> bool:
        """Whether the server expects TLS; checked on a separate connection."""
        return self._connection.peer_certificate() is not None

    def _make_ready(self) -> None:
        """Connect if needed. Data between requests can only be the end: the server closes idle connections."""
        sock = self._connection.sock
        if sock is not None and _is_readable(sock):
            self._connection.close()
        if self._connection.sock is None:
            self._connection.connect()

    @contextlib.contextmanager
    def _translating(self) -> Iterator[None]:
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise connection_errors.broken(error, self._address) from error


class _Response(http.client.HTTPResponse):
    """A response that begins after a limited number of interim ones (100 Continue)."""

    num_begun = 0

    def _read_status(self) -> tuple[str, int, str]:
        self.num_begun += 1
        if self.num_begun > MAX_INTERIM_RESPONSES:
            raise http.client.HTTPException("it sends interim responses without end")
        status: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]
        return status


class _Connection(http.client.HTTPConnection):
    """Connects directly or through a proxy's tunnel, then starts TLS unless `context` is None."""

    response_class = _Response

    def __init__(self, address: Address, context: ssl.SSLContext | None, proxy: Proxy | None, timeout: float) -> None:
        super().__init__(address.host, address.port, timeout=timeout)
        self._address, self._context, self._proxy, self._seconds = address, context, proxy, timeout

    def connect(self) -> None:
        """Connect to the server, through the proxy if there is one."""
        first = self._address if self._proxy is None else self._proxy.address
        try:
            sock = socket.create_connection((first.host, first.port), self._seconds)
        except (OSError, UnicodeError) as error:
            raise connection_errors.unreachable(error, self._address, self._proxy) from error
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._proxy is not None:
                self._open_tunnel(sock, self._proxy)
            self.sock = sock if self._context is None else self._encrypt(sock, self._context)
        except BaseException:
            sock.close()
            raise

    def peer_certificate(self) -> bytes | None:
        """Return the server's unverified certificate (DER), or None."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent or trusted here
        probe = _Connection(self._address, context, self._proxy, PROBE_SECONDS)
        try:
            probe.connect()
            return probe.sock.getpeercert(binary_form=True) if isinstance(probe.sock, ssl.SSLSocket) else None
        except TransportError:
            return None
        finally:
            probe.close()

    def _open_tunnel(self, sock: socket.socket, proxy: Proxy) -> None:
        target = str(replace(self._address, host=self._address.host.encode("idna").decode("ascii")))
        headers = "".join(f"{name}: {value}\r\n" for name, value in {"Host": target, **proxy.headers}.items())
        try:
            sock.sendall(f"CONNECT {target} HTTP/1.1\r\n{headers}\r\n".encode("ascii"))
            response = _Response(sock, method="CONNECT")
            response.begin()
        except (OSError, http.client.HTTPException) as error:
            raise connection_errors.no_tunnel(error, self._address, proxy) from error
        response.close()
        if not 200 <= response.status < 300:
            raise connection_errors.no_tunnel(response.status, self._address, proxy)

    def _encrypt(self, sock: socket.socket, context: ssl.SSLContext) -> ssl.SSLSocket:
        try:
            return context.wrap_socket(sock, server_hostname=self._address.host)
        except (OSError, ValueError) as error:
            raise connection_errors.tls_failed(
                error, self._address, self._proxy, context, self.peer_certificate
            ) from error


def _answer(response: http.client.HTTPResponse) -> Answer:
    """Read the response.

    Raises:
        HTTPException: it is longer than `MAX_ANSWER_BYTES`, or ends early.
    """
    with response:  # one that ends with its connection holds that open, even once `_Connection` is closed
        content = response.read(MAX_ANSWER_BYTES + 1)
    if len(content) > MAX_ANSWER_BYTES:
        raise http.client.HTTPException(f"the answer is longer than {MAX_ANSWER_BYTES:,} bytes")
    if response.length:
        raise http.client.IncompleteRead(content, response.length)
    headers = {name: value for name in HEADER_NAMES if (value := response.getheader(name)) is not None}
    return Answer(status=response.status, headers=headers, content=content)


def _is_readable(sock: socket.socket) -> bool:
    watch = select.poll()
    watch.register(sock, select.POLLIN)
    return bool(watch.poll(0))
