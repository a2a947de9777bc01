"""The server that clients connect to: Flower's engine behind FedShelf's ASGI app, in threads of this process."""

import collections
import contextlib
import errno
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import uvicorn

import fedshelf
from fedshelf.core.errors import FedShelfError, TransportError
from fedshelf.core.messages import PROTOCOL_VERSION
from fedshelf.core.system_errors import reason
from fedshelf.deploy import quiet_engine_log
from fedshelf.deploy.address import Address
from fedshelf.deploy.admission import Admission
from fedshelf.deploy.asgi_app import FleetApp
from fedshelf.deploy.blobs import Blobs
from fedshelf.deploy.flower_engine import ROUTES, FlowerEngine
from fedshelf.deploy.flower_grid import EmbeddedGrid
from fedshelf.deploy.grid_transport import GridTransport
from fedshelf.deploy.http_server import Connections, LimitedServer
from fedshelf.deploy.tls import ServerTls, certificate_fingerprint
from fedshelf.identity.chain import Chain
from fedshelf.storage.atomic_files import temporary_folder

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 2.0  # time for clients to close their connections when the server stops
RENEW_SECONDS = 3600.0  # between looks at the server's certificate
KEEP_ALIVE_SECONDS = 20.0  # interval of the engine's own heartbeats


class EmbeddedServer:
    """A server that listens from construction until `close`.

    Args:
        host: the address to listen on; "" or "0.0.0.0" listens on all interfaces.
        port: the port; 0 chooses a free one (see `address`).
        tls: certificate and key; None disables TLS.
        silence: seconds without a sign of life after which a client counts as offline.
        grace: seconds a disconnected client has to reconnect before it counts as offline.
        incoming: folder for uploads in progress, on the spool's file system; existing uploads are resumed. Defaults to
            a temporary folder.
        chain: who may take part. By default anybody may, under a name that nobody has.
        renew: renews the files of `tls` if they end soon; called from time to time.

    Attributes:
        address: the address the server listens on.

    Raises:
        TransportError: the address is in use or does not belong to this machine.
    """

    def __init__(
        self, *, host: str, port: int, tls: ServerTls | None, silence: float = 30.0, grace: float = 3.0,
        incoming: Path | None = None, chain: Chain | None = None,
        renew: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        quiet_engine_log()
        self._socket = _listen(host, port)
        self.address = Address(host=host, port=self._socket.getsockname()[1])
        self._temporary = contextlib.ExitStack()
        if incoming is None:
            incoming = Path(self._temporary.enter_context(temporary_folder("fedshelf-")))
        self._blobs = Blobs.below(incoming)
        if chain is None:
            chain = Chain(Path(self._temporary.enter_context(temporary_folder("fedshelf-"))), is_open=True)
        self._chain, self._tls, self._renew = chain, tls, renew
        self._engine = FlowerEngine(silence=silence, roster=chain.roster)
        self._fingerprints: collections.deque[str] = collections.deque(
            maxlen=2
        )  # of the server's certificate, and of the one before
        if tls is not None:
            self._fingerprints.append(certificate_fingerprint(tls.certificate))
        admission = Admission(
            chain, authority=None if tls is None or tls.is_own else tls.ca, servers=lambda: tuple(self._fingerprints)
        )
        health = {"version": fedshelf.__version__, "protocol": PROTOCOL_VERSION}
        self._app = FleetApp(
            self._engine, ROUTES, admission, self._blobs, health=health, hold=min(8.0, silence / 4),
            grace=min(grace, silence),
        )  # fmt: skip
        config = uvicorn.Config(
            self._app, log_config=None, access_log=False, http="httptools", ws="none", proxy_headers=False,
            timeout_keep_alive=75, timeout_graceful_shutdown=2 * CLOSE_SECONDS,
            ssl_certfile=tls and str(tls.certificate), ssl_keyfile=tls and str(tls.key),
            ssl_ca_certs=tls and str(chain.authority_file), ssl_cert_reqs=ssl.CERT_OPTIONAL,
        )  # fmt: skip
        self._config = config
        self._server = LimitedServer(config, Connections(chain.audit.count))
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._server.run, args=([self._socket],), name="fedshelf-http", daemon=True),
            threading.Thread(target=self._keep_alive, name="fedshelf-engine", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        while not self._server.started:
            if not self._threads[0].is_alive():
                raise TransportError(f"the server on {self.address} did not start: see the log")
            time.sleep(0.01)

    def transport(self, *, close_timeout: float = 5.0) -> GridTransport:
        """Create the transport. Call once.

        Args:
            close_timeout: seconds that closing waits for clients to acknowledge.

        Returns:
            The transport for all connections.
        """
        grid = EmbeddedGrid(self._engine, self._app.notify, self._app.announce_end)
        return GridTransport(grid, engine=grid, blobs=self._blobs, close_timeout=close_timeout)

    def close(self) -> None:
        """Stop listening and free the port. To clients, the server disappears."""
        self._stop.set()
        self._server.should_exit = True
        self._app.close()
        self._threads[0].join(CLOSE_SECONDS)
        self._app.call_soon(self._cut_off)
        for thread in self._threads:
            thread.join(10)
        self._socket.close()
        self._engine.finish()
        self._chain.audit.flush()
        self._temporary.close()

    def _cut_off(self) -> None:
        """Drop connections of dead or hanging clients, which would never close them."""
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _keep_alive(self) -> None:
        due = time.monotonic() + RENEW_SECONDS
        while not self._stop.wait(KEEP_ALIVE_SECONDS):
            self._engine.keep_alive()
            self._chain.audit.flush(if_due=True)
            if time.monotonic() > due:
                due = time.monotonic() + RENEW_SECONDS
                self._renew_certificate()

    def _renew_certificate(self) -> None:
        """Let new connections use the server's next certificate, if there is one."""
        if self._tls is None:
            return
        try:
            self._renew()
            newest = certificate_fingerprint(self._tls.certificate)
            if newest != self._fingerprints[-1]:
                self._fingerprints.append(newest)
                self._config.ssl.load_cert_chain(self._tls.certificate, self._tls.key)
                logger.warning("the server's certificate was renewed")
        except (FedShelfError, OSError, ValueError) as error:
            logger.error("the server's certificate is not renewed: %s", error)


def _listen(host: str, port: int) -> socket.socket:
    address = str(Address(host=host or "0.0.0.0", port=port))  # noqa: S104 the caller asked for everywhere
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, target = min(found, key=lambda entry: entry[0])  # IPv4 if a name has both
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family is socket.AF_INET6:
                with contextlib.suppress(OSError):  # falls back to IPv6 only
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind(target)
            listener.listen(1024)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        advice = {
            errno.EADDRINUSE: "another program (another server?) listens there; stop it, or choose --address HOST:PORT",
            errno.EADDRNOTAVAIL: "this machine does not have that address; leave --address out, and if clients reach "
            f"this server by it (NAT, Docker), give --advertise {address}",
            errno.EACCES: "ports below 1024 need privileges; choose a higher one with --address HOST:PORT",
        }.get(error.errno or 0, f"{reason(error)}; choose another with --address HOST:PORT")
        raise TransportError(f"the server cannot listen on {address}: {advice}") from error
    return listener
