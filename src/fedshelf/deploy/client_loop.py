"""A client that stays: it joins, answers what the server asks, and comes back after any break."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from flwr.app import Message

from fedshelf.core.errors import FedShelfError, TransportError
from fedshelf.core.messages import Failure, Join
from fedshelf.deploy.active_hours import Availability
from fedshelf.deploy.address import parse_address
from fedshelf.deploy.blob_client import ReceivedBlob
from fedshelf.deploy.client_part import ClientPart, Ended, EndKind, Handler
from fedshelf.deploy.crash_reporter import CrashReporter, ReportTarget
from fedshelf.deploy.engine import quiet_engine_log
from fedshelf.deploy.failure_text import failure_text
from fedshelf.deploy.flower_client import FleetSession
from fedshelf.deploy.http_connection import ServerAwayError, SessionLostError
from fedshelf.deploy.records import Envelope, SendHook, WireMessage, open_records, to_parcel
from fedshelf.deploy.tls import client_context, local_authority

LOG = logging.getLogger(__name__)

FIRST_BACKOFF, LAST_BACKOFF = 0.5, 5.0  # seconds between attempts to reach a server
GLITCH_SECONDS = 20.0  # an interruption this short does not end a registration
PAUSE_SECONDS = 1.0  # between attempts to hear from a server that is away

_T = TypeVar("_T")


def run_client(
    server_address: str,
    handle: Handler,
    join: Join,
    *,
    ca: Path | None = None,
    insecure: bool = False,
    stop: threading.Event | None = None,
    on_status: Callable[[str], None] = LOG.info,
    on_send: SendHook | None = None,
    max_wait: float | None = None,
    availability: Availability | None = None,
    reporter: CrashReporter | None = None,
) -> Ended:
    """Take part until the server closes the run, refuses this client, or `stop` is set.

    Args:
        server_address: HOST:PORT.
        handle: answers the server's messages; what it raises becomes a `Failure`, and the client goes on.
        join: how to introduce this client.
        ca: certificate authority to trust; without one, that of this machine's own server and the system's.
        insecure: speak in clear.
        stop: set it to leave after the message at hand.
        on_status: told what the connection does, one line for a person.
        on_send: called with everything that leaves this client, before encryption.
        max_wait: seconds to wait for a server that does not answer, while the door is open; None is forever.
        door: when this client may work (always, without one). Once it closes, the task at hand is finished and
            delivered, and the client leaves until it opens.
        reporter: tells the server if this process dies.

    Raises:
        TransportError: the server is not who it should be, does not speak our protocol, or stayed away `max_wait`.
    """
    quiet_engine_log()
    address = parse_address(server_address)
    stop, availability = stop or threading.Event(), availability or Availability()
    part, held = ClientPart(join=join, handle=handle), ReceivedBlob()
    away_since, backoff = time.monotonic(), FIRST_BACKOFF
    on_status(f"connecting to {address}")
    while not stop.is_set():
        away_since += availability.wait(stop, on_status)
        if stop.is_set():
            break
        authority = local_authority()
        try:
            # Anew each time: a server on this machine may just have made its certificate authority.
            session = FleetSession(address, None if insecure else client_context(ca), held)
            on_status(f"connected to {address}")
            token = session.crash_token
            target = ReportTarget(
                address=str(address), ca=None if ca is None else str(ca), insecure=insecure, token=token
            )
            with reporter.reporting_to(target) if reporter else contextlib.nullcontext():
                ended = _Visit(session, part, stop, availability, on_send).run()
            if ended is not None:
                return ended
        except TransportError:
            if insecure or ca is not None or local_authority() == authority:
                raise
            on_status("a server on this machine has just made its certificate authority; trying again")
        except (ServerAwayError, SessionLostError) as error:
            if max_wait is not None and time.monotonic() - away_since > max_wait:
                raise TransportError(f"the server on {address} did not answer for {max_wait:g} s ({error})") from error
            on_status(f"the server on {address} is away ({error}); trying again in {backoff:g} s")
            stop.wait(backoff)
            backoff = min(2 * backoff, LAST_BACKOFF)
        else:
            if stop.is_set():
                break
            away_since, backoff = time.monotonic(), FIRST_BACKOFF
            if availability.is_open():
                on_status(f"the connection to {address} was lost; joining again")
                stop.wait(FIRST_BACKOFF)
    return Ended(kind=EndKind.STOPPED, reason="stopped")


class _Visit:
    """From one registration to its end. A second thread waits for the run's end, and is the heartbeat."""

    def __init__(
        self,
        session: FleetSession,
        part: ClientPart,
        stop: threading.Event,
        availability: Availability,
        on_send: SendHook | None,
    ) -> None:
        self._session = session
        self._part = part
        self._stop = stop
        self._door = availability
        self._on_send = on_send
        self._over = threading.Event()
        self._end = ""

    def run(self) -> Ended | None:
        """Answer messages; None when the registration is lost, or the door has closed."""
        watch = threading.Thread(target=self._watch, name="fedshelf-wait", daemon=True)
        watch.start()
        try:
            while not self._end and self._door.is_open() and not self._stop.is_set():
                message = self._patiently(self._session.pull)
                if message is None or not self._door.is_open():
                    continue  # what came after closing is not begun: the server sees this client leave
                ended = self._answer(message)
                if ended is not None:
                    return ended
            return Ended(kind=EndKind.CLOSED, reason=self._end) if self._end else None
        except (SessionLostError, ServerAwayError) as error:
            LOG.info("the registration is lost: %s", error)
            return None
        finally:
            self._over.set()
            self._session.leave()

    def _answer(self, message: Message) -> Ended | None:
        """Fetch what the message names, do what it asks, and send the answer; its blob first."""
        asked, blob = None, None
        answer: WireMessage
        try:
            asked = open_records(message.content)
            if isinstance(asked, Envelope) and asked.external_blob:
                blob = self._patiently(partial(self._session.fetch, asked.external_blob))
                if blob is None:
                    return None  # withdrawn, or the end of this visit
            answer, ended = self._part.answer_to(asked, blob)
        except FedShelfError as error:  # not a message of ours, or its blob cannot be had
            task = asked.header.task if isinstance(asked, Envelope) else None
            answer, ended = Failure(reason=failure_text(error), key=task), None
        if not self._deliver(message, answer):
            return None
        return ended

    def _deliver(self, message: Message, answer: WireMessage) -> bool:
        """Whether there was a server to take, or to refuse, the answer."""
        parcel = to_parcel(answer)
        if self._on_send is not None:
            self._on_send(parcel)
        # Made once: sent again after a break, it must be the same.
        reply = Message(parcel.records, reply_to=message)
        if parcel.blob.pieces:
            try:
                wanted = self._patiently(lambda: self._session.upload(parcel.blob))
            except FedShelfError as error:
                LOG.warning("the answer cannot be delivered: %s", error)
                failure = Failure(reason=failure_text(error), key=getattr(answer, "key", None))
                return self._deliver(message, failure)
            if not wanted:
                return False
        self._patiently(lambda: self._session.send(reply))
        return True

    def _watch(self) -> None:
        while not self._over.is_set():
            try:
                self._end = self._session.wait_for_end() or self._end
            except (ServerAwayError, SessionLostError, AttributeError):  # AttributeError: closed while leaving
                self._over.wait(PAUSE_SECONDS)  # the other thread finds out

    def _patiently(self, request: Callable[[], _T]) -> _T | None:
        """`request`'s result, through interruptions shorter than `GLITCH_SECONDS`; None once this visit is to end."""
        deadline, backoff, moved = time.monotonic() + GLITCH_SECONDS, FIRST_BACKOFF, self._session.num_moved
        while True:
            try:
                return request()
            except ServerAwayError as error:
                LOG.info("the server is away: %s", error)
                if self._session.num_moved > moved:  # it was there meanwhile
                    deadline, backoff = time.monotonic() + GLITCH_SECONDS, FIRST_BACKOFF
                    moved = self._session.num_moved
                if time.monotonic() > deadline:
                    raise
                if self._end or self._stop.wait(backoff):
                    return None
                backoff = min(2 * backoff, LAST_BACKOFF)
