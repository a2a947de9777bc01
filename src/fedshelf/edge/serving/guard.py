"""Refuses requests that another web site, or a stranger in the network, makes a browser or a machine send.

* A name in `Host` that is not this server's: DNS rebinding, by which a web site reads what a local server answers.
* A foreign or `null` `Origin` on a POST: a web site that writes to a local server.
* No token, where the server can be reached from other machines.
"""

import hmac
import ipaddress
import socket
from collections.abc import Collection
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedshelf.edge.serving.browser_model import RUNTIME_FILES

OPEN_PATHS = frozenset({
    "/", "/page.css", "/page.js", "/favicon.ico", "/healthz", "/readyz", "/in-browser.js", "/service-worker.js",
    *(f"/runtime/{name}" for name in RUNTIME_FILES),
})  # fmt: skip
"""Served without a token: they tell nothing of the store."""
WASM_POLICY = "script-src 'self' 'wasm-unsafe-eval'"
"""Takes the place of `script-src 'self'` where the browser runs the model: WebAssembly, but no text as a script."""
SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), geolocation=(), microphone=()",
    "cache-control": "no-store",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """Who may use the server.

    Attributes:
        names: host names by which it may be called, lower case.
        any_address: whether it may be called by any IP address, which no rebinding can forge; else by loopback alone.
        token: what requests must carry; empty: nothing.
    """

    names: frozenset[str]
    any_address: bool
    token: str

    @classmethod
    def of(cls, host: str, *, token: str, names: Collection[str] = ()) -> "Access":
        """The access to a server that listens on `host`.

        Args:
            host: an address or a name.
            token: see `Access`; for other addresses than loopback.
            names: further names of the server.
        """
        allowed = {"localhost", *names}
        if is_loopback(host):
            return cls(names=frozenset(map(str.lower, allowed)), any_address=False, token="")
        machine = socket.gethostname()
        allowed |= {host, machine, f"{machine.split('.')[0]}.local"}
        return cls(names=frozenset(map(str.lower, allowed)), any_address=True, token=token)

    def problem(self, scope: Scope) -> tuple[int, str]:
        """Why a request is refused, with its HTTP status; (0, "") if it is not."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            return 403, "this server is not called by that name: start it with --allow-host NAME to allow it"
        if scope["method"] not in ("GET", "HEAD"):
            origins = headers.getlist("origin")
            if len(origins) > 1 or (origins and origins[0].partition("://")[2].lower() != hosts[0].lower()):
                return 403, "requests from other web sites are refused"
            if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
                return 403, "requests from other web sites are refused"
        if self.token and scope["path"] not in OPEN_PATHS:
            sent = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(sent, b"Bearer " + self.token.encode()):
                return 401, "a token is needed: open the link that the server showed when it was first started"
        return 0, ""

    def _is_own(self, host: str) -> bool:
        name = _without_port(host).lower()
        if name in self.names:
            return True
        try:
            address = ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return self.any_address or address.is_loopback


@dataclass(frozen=True, kw_only=True, slots=True)
class Guard:
    """ASGI middleware: refuses requests before they are read, and adds security headers to all answers.

    Attributes:
        app: what answers the other requests.
        access: who may use it.
        runs_wasm: whether the page may run WebAssembly.
    """

    app: ASGIApp
    access: Access
    runs_wasm: bool = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(SECURITY_HEADERS)
                if self.runs_wasm:
                    policy = headers["content-security-policy"]
                    headers["content-security-policy"] = policy.replace("script-src 'self'", WASM_POLICY)
            await send(message)

        status, reason = self.access.problem(scope)
        if not status:
            await self.app(scope, receive, with_headers)
            return
        extra = {"www-authenticate": "Bearer"} if status == 401 else {}
        answer = JSONResponse({"error": reason}, status, {**extra, "connection": "close"})
        await answer(scope, receive, with_headers)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.rpartition(":")[0] if host.count(":") == 1 else host
