"""Runs the HTTP server: address, token, TLS, and an orderly end."""

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from fedshelf.config.places import home_directory, make_home_folder
from fedshelf.core.errors import UsageError
from fedshelf.core.system_errors import reason
from fedshelf.edge.serving.connection import Connection
from fedshelf.edge.serving.guard import is_loopback
from fedshelf.storage.atomic_files import write_atomically

TOKEN_VARIABLE = "FEDSHELF_EDGE_TOKEN"  # noqa: S105  the name of a variable
MIN_TOKEN_CHARACTERS = 20
MAX_CONNECTIONS = 64
SHUTDOWN_SECONDS = 10  # for requests that are being answered
_MAX_TOKEN_BYTES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where the server listens.

    Attributes:
        host: an IP address or a name.
        port: the port; 0 takes a free one.
        certificate: PEM file of the TLS certificate and its chain; None: no TLS.
        key: PEM file of its key.
    """

    host: str
    port: int
    certificate: Path | None = None
    key: Path | None = None

    def listen(self) -> socket.socket:
        """Open the socket.

        Raises:
            UsageError: the address is not this machine's, or in use; or the certificate cannot be used.
        """
        if (self.certificate is None) != (self.key is None):
            raise UsageError("--tls-cert and --tls-key belong together: give both or neither")
        if self.certificate is not None and self.key is not None:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key, lambda: "")
            except (OSError, ValueError) as error:
                raise UsageError(
                    f"--tls-cert {self.certificate} and --tls-key {self.key} cannot be used: {reason(error)}. They "
                    "must be PEM files that belong together, and the key must have no passphrase"
                ) from error
        try:
            family, kind, protocol, _, target = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = socket.socket(family, kind, protocol)
        except OSError as error:
            raise UsageError(f"--host {self.host}: {reason(error)}: give an address of this machine") from error
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(target)
            listener.listen(MAX_CONNECTIONS)
        except OSError as error:
            listener.close()
            advice = {
                errno.EADDRINUSE: "stop what uses it, or choose another --port",
                errno.EACCES: "ports below 1024 need a privilege: choose another --port",
            }.get(error.errno or 0, "give an address of this machine as --host")
            raise UsageError(f"cannot listen on {self.host}, port {self.port}: {reason(error)}; {advice}") from error
        return listener

    def url(self, listener: socket.socket) -> str:
        """The address of the page, as a person on this machine opens it."""
        port = listener.getsockname()[1]
        host = socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host  # noqa: S104
        host = f"[{host}]" if ":" in host else host
        return f"{'http' if self.certificate is None else 'https'}://{host}:{port}/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """What requests from other machines must carry.

    Attributes:
        text: the token; empty for a server that only this machine reaches.
        source: where it came from, for people.
        is_new: whether it was just made, so that it has to be shown.
    """

    text: str = ""
    source: str = ""
    is_new: bool = False

    @classmethod
    def find(cls, host: str, file: Path | None) -> "Token":
        """Find the token: in `file`, in the environment, or in the home, where it is made if it is missing.

        Args:
            host: where the server listens; a loopback address needs none.
            file: --token-file.

        Raises:
            UsageError: the file cannot be read, or the token is too short to be safe.
            RunError: the home cannot be written to.
        """
        if is_loopback(host):
            return cls()
        if file is not None:
            return cls(text=_checked(_read(file), f"--token-file {file}"), source=f"'{file}'")
        if TOKEN_VARIABLE in os.environ:
            return cls(text=_checked(os.environ[TOKEN_VARIABLE], TOKEN_VARIABLE), source=TOKEN_VARIABLE)
        own = make_home_folder(home_directory() / "edge") / "token"
        if own.exists():
            return cls(text=_checked(_read(own), f"'{own}'"), source=f"'{own}'")
        text = secrets.token_urlsafe(24)
        write_atomically(own, text + "\n")
        return cls(text=text, source=f"'{own}'", is_new=True)


def run(app: ASGIApp, address: Address, listener: socket.socket, *, on_start: Callable[[], None]) -> None:
    """Serve until SIGTERM or Ctrl-C; requests that are being answered are finished.

    Args:
        app: the ASGI app.
        address: the address.
        listener: its socket.
        on_start: called when connections are accepted.
    """
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, date_header=False, proxy_headers=False,
        http=Connection, ws="none", lifespan="on",
        limit_concurrency=MAX_CONNECTIONS, timeout_keep_alive=15, timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        backlog=MAX_CONNECTIONS,
        ssl_certfile=address.certificate, ssl_keyfile=address.key,
    )  # fmt: skip
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    with contextlib.closing(listener):
        asyncio.run(_Server(config, on_start).serve(sockets=[listener]))


class _Server(uvicorn.Server):  # type: ignore[misc]  # mypy does not follow imports into uvicorn
    """uvicorn's server, which ends by itself on a signal instead of raising the signal again."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()


def _read(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return opened.read(_MAX_TOKEN_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the token file '{file}' cannot be read: {reason(error)}") from error


def _checked(text: str, source: str) -> str:
    token = text.strip()
    if len(token) < MIN_TOKEN_CHARACTERS or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(
            f"{source} holds no safe token: give at least {MIN_TOKEN_CHARACTERS} letters and digits, for example from "
            "'openssl rand -hex 24'"
        )
    return token
