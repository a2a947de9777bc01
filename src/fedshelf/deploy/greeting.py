"""A client's first request: is the peer a FedShelf server of the same protocol, and what time is it there?"""

import http.client
import json

from fedshelf.core.errors import TransportError
from fedshelf.core.messages import PROTOCOL_VERSION
from fedshelf.deploy.address import Address
from fedshelf.deploy.connection_errors import PASSING_STATUSES, ServerUnavailableError
from fedshelf.deploy.http_connection import HttpConnection
from fedshelf.reporting.formatting import duration

CLOCK_HEADER = "fedshelf-clock-ahead"  # seconds, by the time that the server has told
MAX_TIME = 253_402_300_799.0  # the end of the year 9999
MAX_CLOCK_ERROR = 300.0  # seconds by which two clocks may differ without a word
_DAY = 86_400.0


def clock_problem(whose: str, ahead: float, other: str) -> str:
    """Describe two clocks that differ.

    Args:
        whose: the clock, such as `this machine's`.
        ahead: seconds by which it is ahead; negative if it is behind.
        other: the clock that it is compared with.

    Returns:
        A sentence; empty if they differ little.
    """
    if abs(ahead) <= MAX_CLOCK_ERROR:
        return ""
    by = f"{abs(ahead) / _DAY:.0f} days" if abs(ahead) > 2 * _DAY else duration(abs(ahead), digits=0)
    return (
        f"{whose} clock is {by} {'ahead of' if ahead > 0 else 'behind'} {other}. Set the one that is wrong: "
        "certificates, active hours, and the times in the ledger, which the privacy budget counts, go by it"
    )


def greet(connection: HttpConnection, address: Address, *, encrypted: bool) -> float | None:
    """Check that the peer is a FedShelf server with the same protocol.

    Args:
        connection: a connection to it.
        address: its address.
        encrypted: whether the connection uses TLS.

    Returns:
        The server's time, in seconds since 1970; None if it does not say.

    Raises:
        ServerUnavailableError: it does not answer for now.
        TransportError: it is another program, speaks another protocol, or expects TLS.
    """
    try:
        response = connection.request("GET", "/fedshelf/health", {})
    except ServerUnavailableError as error:
        cause = error.__cause__
        is_answer = isinstance(cause, http.client.HTTPException | ConnectionResetError)
        if not encrypted and is_answer and connection.speaks_tls():
            raise TransportError(f"the server on {address} encrypts: run this client without --insecure") from error
        raise
    if response.status in PASSING_STATUSES:
        raise ServerUnavailableError(
            f"{address} answers {response.status}: something stands in front of a server that does not run"
        )
    try:
        answer = json.loads(response.content) if response.status == 200 else {}
    except (ValueError, RecursionError):
        answer = {}
    if not isinstance(answer, dict) or "protocol" not in answer:
        raise TransportError(f"{address} answers, but is not a FedShelf server: check --server-address")
    if answer["protocol"] != PROTOCOL_VERSION:
        raise TransportError(
            f"the server on {address} (FedShelf {answer.get('version')}) speaks protocol "
            f"{answer['protocol']}, this client {PROTOCOL_VERSION}: install the same version on both"
        )
    try:
        time = float(answer["time"])
        return time if 0 <= time <= MAX_TIME else None  # not NaN either
    except (KeyError, ValueError, TypeError):
        return None
