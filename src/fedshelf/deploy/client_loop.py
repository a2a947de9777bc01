"""The client's main loop: joins a server, answers its messages, and reconnects after any interruption."""

import contextlib
import logging
import math
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

from flwr.app import Message

from fedshelf.core.errors import FedShelfError, IdentityError, RosterError, TransportError, UsageError
from fedshelf.core.messages import Failure, Join
from fedshelf.deploy import quiet_engine_log
from fedshelf.deploy.address import Address, parse_server_address
from fedshelf.deploy.blob_client import ReceivedBlob
from fedshelf.deploy.client_part import ClientPart, Ended, EndKind, Handler, failure_text
from fedshelf.deploy.connection_errors import CertificateRejectedError, ServerUnavailableError, SessionLostError
from fedshelf.deploy.crash_reporter import CrashReporter, ReportTarget
from fedshelf.deploy.credentials import Credentials
from fedshelf.deploy.flower_client import FleetSession
from fedshelf.deploy.records import Envelope, SendHook, WireMessage, open_records, to_parcel
from fedshelf.deploy.tls import local_authority
from fedshelf.deploy.waiting import Availability, Repetitions, WaitReporter
from fedshelf.identity.store_keys import StoreKeys
from fedshelf.identity.tokens import Token
from fedshelf.serialization.blob import Buffer
from fedshelf.storage.atomic_files import temporary_folder

logger = logging.getLogger(__name__)

PAUSES = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)  # seconds between attempts to join a server
REFUSED_PAUSES = (5.0, 30.0, 60.0, 300.0)  # seconds until a refused client joins again; each time it sets up anew
FIRST_BACKOFF, LAST_BACKOFF = 0.5, 5.0  # seconds between attempts within a registration
GLITCH_SECONDS = 20.0  # a shorter interruption does not end a registration
PAUSE_SECONDS = 1.0  # between attempts to wait on an unreachable server
LAST_ATTEMPT_SECONDS = 1.0  # for an attempt that begins when the maximum wait is almost over
HELD_SECONDS = 5.0  # for a request that a server may hold for a second

IDLE_ADVICE = (
    "this store is connected and has nothing to do; the server's output, and 'fedshelf runs show' there, tell which "
    "stores it waits for"
)
SILENCE_ADVICE = (
    "it has not answered so far; check that a FedShelf server listens there, and the network and firewalls in between"
)
TRANSFER_ADVICE = "the network is slow or interrupted, or the server is busy"

AnswerHook: TypeAlias = Callable[[WireMessage, int], None]

_T = TypeVar("_T")


def run_client(
    server_address: str,
    handle: Handler,
    join: Join,
    *,
    keys: StoreKeys | None = None,
    token: Token | None = None,
    ca: Path | None = None,
    insecure: bool = False,
    stop: threading.Event | None = None,
    on_status: Callable[[str], None] = logger.info,
    on_send: SendHook | None = None,
    on_answer: AnswerHook = lambda answer, num_bytes: None,
    max_wait: float | None = None,
    availability: Availability | None = None,
    reporter: CrashReporter | None = None,
    max_download: Callable[[], int] = lambda: sys.maxsize,
    find_blob: Callable[[str], Buffer | None] = lambda digest: None,
) -> Ended:
    """Take part in a run until the server closes it, refuses this client for good, or `stop` is set.

    Everything that may pass is retried: an unreachable server, another program or another certificate at its address,
    and a refusal that another run may not repeat.

    Args:
        server_address: HOST:PORT.
        handle: answers the server's messages; an exception becomes a `Failure`, and the client continues.
        join: introduces this client.
        keys: the store's keys; by default new ones, for as long as this client runs.
        token: admits the store if it is not enrolled yet.
        ca: certificate authority to trust; None trusts this machine's own server and the system's authorities.
        insecure: disable TLS.
        stop: set it to leave after the current message.
        on_status: receives connection status lines for the user.
        on_send: receives everything that is sent, before encryption.
        on_answer: receives each delivered answer and its size on the wire in bytes.
        max_wait: seconds to wait for an unresponsive server during active hours; None waits indefinitely.
        availability: when this client may work; None means always. When that time ends, the client finishes and
            delivers the current task, then leaves until the next active period.
        reporter: reports to the server if this process crashes.
        max_download: returns the maximum bytes of a model that the server may send.
        find_blob: finds a blob that this machine has received before, by digest.

    Returns:
        Why the client stopped.

    Raises:
        IdentityError: the server does not admit this store.
        RosterError: the server shows a roster, or a chain's key, that this store does not accept.
        TransportError: the server does not accept this client's certificate, or did not answer for `max_wait`.
        UsageError: `server_address` is not an address that a client can connect to; or TLS cannot be set up on this
            machine, and never could be since this client began.
    """
    quiet_engine_log()
    address = parse_server_address(server_address)
    stop, availability = stop or threading.Event(), availability or Availability()
    part, held = ClientPart(join=join, handle=handle, find_blob=find_blob), ReceivedBlob(max_download)
    retries, patience = _Retries(on_status, stop), _Patience(address, max_wait)
    on_status(f"connecting to {address}")
    with WaitReporter(on_status) as waiting, contextlib.ExitStack() as temporary:
        if keys is None:
            keys = StoreKeys(Path(temporary.enter_context(temporary_folder("fedshelf-"))))
        credentials = Credentials(address, keys, name=join.client, token=token, ca=ca, insecure=insecure)
        was_connected = False
        while not stop.is_set():
            if not availability.is_open():
                waiting.end()
            patience.since += availability.wait(stop, on_status)
            if stop.is_set():
                break
            waiting.begin(f"the server at {address}", otherwise=SILENCE_ADVICE)
            authority = local_authority() if ca is None and not insecure else ""
            try:
                # Created for each attempt: a server on this machine may just have created its certificate authority.
                session = patience.bound(partial(FleetSession, credentials, held), afterwards=_leave)
                credentials.accepted()
                was_connected = True
                retries.say(f"connected to {address}")
                target = ReportTarget(
                    address=str(address), ca=None if credentials.trusted is None else str(credentials.trusted),
                    insecure=insecure, token=session.crash_token,
                )  # fmt: skip
                visit = _Visit(session, part, stop, availability, on_send, on_answer, waiting, patience)
                with reporter.reporting_to(target) if reporter else contextlib.nullcontext():
                    ended = visit.run()
                if ended is not None and ended.kind is not EndKind.REFUSED_FOR_NOW:
                    return ended
            except (ServerUnavailableError, SessionLostError) as error:
                patience.check(error)
                retries.say(f"{error}; trying again")
                waiting.begin(f"the server at {address}", str(error))
                retries.pause(patience.left())
            except (IdentityError, CertificateRejectedError) as error:
                if not credentials.start_over(error):
                    raise
                on_status(f"{error}; enrolling again")
            except RosterError:
                raise
            except FedShelfError as error:
                if not insecure and ca is None and local_authority() != authority:
                    on_status("a server on this machine has just made its certificate authority; trying again")
                elif isinstance(error, UsageError) and not was_connected:
                    raise
                else:  # the server, the network or this machine has changed, and may change again
                    patience.check(error)
                    retries.say(f"{error}; trying again")
                    waiting.begin(f"the server at {address}", str(error))
                    retries.pause(patience.left())
            else:
                if ended is not None:
                    waiting.end()
                    retries.refused(ended.reason)
                    patience.since = time.monotonic()
                    continue
                if visit.lost:
                    patience.check(visit.lost)
                if visit.num_answered:
                    retries.start_over()
                if availability.is_open() and not stop.is_set():
                    retries.say(f"the connection to {address} was lost ({visit.lost}); joining again")
                    retries.pause(patience.left())
    return Ended(kind=EndKind.STOPPED, reason="stopped")


def _leave(late: "futures.Future[FleetSession]") -> None:
    """Leave a session that nobody waited for."""
    if late.exception() is None:
        late.result().leave()


class _Retries:
    """Pauses of increasing length between attempts, with fewer and fewer repeated status lines."""

    def __init__(self, on_status: Callable[[str], None], stop: threading.Event) -> None:
        self._on_status = on_status
        self._stop = stop
        self._repetitions = Repetitions()
        self._last = ""
        self._count = 0
        self._refusals, self._refused_since = 0, ""

    def say(self, text: str) -> None:
        """Report `text` unless it repeats the last line except for its numbers, or was reported recently."""
        key = re.sub(r"\d+", "", text)
        if key != self._last and self._repetitions.allow(key):
            self._on_status(text)
        self._last = key

    def pause(self, longest: float) -> None:
        """Wait before the next attempt, at most `longest` seconds."""
        self._stop.wait(max(0.0, min(longest, PAUSES[min(self._count, len(PAUSES) - 1)])))
        self._count += 1

    def refused(self, reason: str) -> None:
        """Report that the server refuses this client for now, and wait before the next attempt."""
        pause = REFUSED_PAUSES[min(self._refusals, len(REFUSED_PAUSES) - 1)]
        self._refusals += 1
        self._refused_since = self._refused_since or time.strftime("%Y-%m-%d %H:%M:%S")
        self.say(
            f"the server does not let this store take part: {reason}; joining again in {pause:g} s "
            f"(attempt {self._refusals} since {self._refused_since})"
        )
        self._stop.wait(pause)

    def start_over(self) -> None:
        """Reset the pauses after contact with the server."""
        self._count = self._refusals = 0
        self._refused_since = ""


class _SilentError(ServerUnavailableError):
    """A request was given up because the maximum wait is over. Its connection is still in use."""


class _Patience:
    """The maximum wait for an answer from the server.

    Attributes:
        since: when the wait for an answer began (`time.monotonic`).
    """

    def __init__(self, address: Address, max_wait: float | None) -> None:
        self.since = time.monotonic()
        self._address = address
        self._max_wait = max_wait

    def left(self) -> float:
        """Seconds until the wait is over; infinity without a maximum."""
        return math.inf if self._max_wait is None else self.since + self._max_wait - time.monotonic()

    def check(self, reason: object) -> None:
        """Check that the wait is not over.

        Raises:
            TransportError: it is; the message includes the `reason`.
        """
        if self.left() <= 0:
            raise TransportError(f"the server on {self._address} did not answer for {self._max_wait:g} s ({reason})")

    def bound(
        self, request: Callable[[], _T], *, afterwards: Callable[["futures.Future[_T]"], object],
        least: float = LAST_ATTEMPT_SECONDS, num_moved: Callable[[], int] = lambda: 0,
    ) -> _T:  # fmt: skip
        """Return the result of `request`, and stop waiting for it when the wait is over.

        A timeout of the connection does not suffice: it is about one packet, not about the whole answer.

        Args:
            request: a request to the server.
            afterwards: called with an answer that nobody waited for, in another thread.
            least: seconds that the request has in any case.
            num_moved: bytes transferred so far; progress starts the wait anew.

        Raises:
            ServerUnavailableError: the wait is over.
        """
        if self._max_wait is None:
            return request()
        answer: futures.Future[_T] = futures.Future()

        def work() -> None:
            try:
                answer.set_result(request())
            except BaseException as error:  # noqa: BLE001  raised below
                answer.set_exception(error)

        threading.Thread(target=work, name="fedshelf-request", daemon=True).start()
        moved = num_moved()
        while not futures.wait([answer], max(self.left(), least)).done:
            if num_moved() == moved:
                answer.add_done_callback(afterwards)
                raise _SilentError(SILENCE_ADVICE)
            moved, self.since = num_moved(), time.monotonic()
        return answer.result()


class _Visit:
    """One registration, from beginning to end. A second thread waits for the run's end and acts as the heartbeat.

    Attributes:
        num_answered: number of server messages answered.
        lost: why the registration was lost.
    """

    def __init__(
        self,
        session: FleetSession,
        part: ClientPart,
        stop: threading.Event,
        availability: Availability,
        on_send: SendHook | None,
        on_answer: AnswerHook,
        waiting: WaitReporter,
        patience: _Patience,
    ) -> None:
        self.num_answered = 0
        self.lost = ""
        self._session = session
        self._part = part
        self._stop = stop
        self._availability = availability
        self._on_send = on_send
        self._on_answer = on_answer
        self._waiting = waiting
        self._patience = patience
        self._over = threading.Event()
        self._end = ""
        self._is_stuck = False

    def run(self) -> Ended | None:
        """Answer messages; return None when the registration is lost or the active hours end."""
        watch = threading.Thread(target=self._watch, name="fedshelf-wait", daemon=True)
        watch.start()
        try:
            while not self._end and self._availability.is_open() and not self._stop.is_set():
                message = self._patiently("work from the server", self._session.pull, IDLE_ADVICE)
                if message is None or not self._availability.is_open():
                    continue  # outside active hours, new messages are not started: the server sees this client leave
                ended = self._answer(message)
                self.num_answered += 1
                if ended is not None:
                    return ended
            return Ended(kind=EndKind.CLOSED, reason=self._end) if self._end else None
        except (SessionLostError, ServerUnavailableError) as error:
            self.lost = str(error)
            return None
        except FedShelfError:
            raise
        except Exception as error:
            # What the server sent is not as our servers send it: this registration ends, not the process.
            logger.debug("the session failed", exc_info=True)
            self.lost = f"what the server sent cannot be used: {failure_text(error)}"
            return None
        finally:
            self._over.set()
            if not self._is_stuck:
                with contextlib.suppress(_SilentError):
                    self._patience.bound(self._session.leave, afterwards=lambda answer: None)

    def _answer(self, message: Message) -> Ended | None:
        """Fetch the message's blob, handle the message, and send the answer, blob first."""
        asked, blob = None, None
        answer: WireMessage
        try:
            asked = open_records(message.content)
            if isinstance(asked, Envelope) and asked.external_blob:
                blob = self._part.find_blob(asked.external_blob) or self._patiently(
                    "the model to arrive", partial(self._session.fetch, asked.external_blob), TRANSFER_ADVICE
                )
                if blob is None:
                    return None  # withdrawn, or this visit has ended
            answer, ended = self._part.answer_to(asked, blob)
        except ServerUnavailableError:
            raise
        except FedShelfError as error:  # not a FedShelf message, or its blob is unavailable
            task = asked.header.task if isinstance(asked, Envelope) else None
            answer, ended = Failure(reason=failure_text(error), key=task), None
        if not self._deliver(message, answer):
            return None
        return ended

    def _deliver(self, message: Message, answer: WireMessage) -> bool:
        """Whether a server was there to accept or refuse the answer."""
        parcel = to_parcel(answer)
        if self._on_send is not None:
            self._on_send(parcel)
        # Created once: a retry after a break must send the same message.
        reply = Message(parcel.records, reply_to=message)
        if parcel.blob.pieces:
            try:
                wanted = self._patiently(
                    "the answer to arrive", lambda: self._session.upload(parcel.blob), TRANSFER_ADVICE
                )
            except ServerUnavailableError:
                raise
            except FedShelfError as error:
                logger.warning("the answer cannot be delivered: %s", error)
                failure = Failure(reason=failure_text(error), key=getattr(answer, "key", None))
                return self._deliver(message, failure)
            if not wanted:
                return False
        self._patiently("the answer to arrive", lambda: self._session.send(reply), TRANSFER_ADVICE)
        self._on_answer(answer, parcel.num_header_bytes + parcel.blob.size)
        return True

    def _watch(self) -> None:
        while not self._over.is_set():
            try:
                self._end = self._session.wait_for_end() or self._end
            except (FedShelfError, SessionLostError, AttributeError):  # AttributeError: closed while leaving
                self._over.wait(PAUSE_SECONDS)  # the main thread handles it

    def _patiently(self, what: str, request: Callable[[], _T], advice: str = "") -> _T | None:
        """Retry `request` through interruptions shorter than `GLITCH_SECONDS`.

        A result of None leaves the client waiting for `what`.

        Returns:
            The request's result, or None if this visit is to end.
        """
        deadline, backoff, moved = time.monotonic() + GLITCH_SECONDS, FIRST_BACKOFF, self._session.num_moved
        self._waiting.begin(what, advice)
        self._patience.since = time.monotonic()
        while True:
            try:
                result = self._patience.bound(
                    request, afterwards=lambda answer: self._session.leave(),
                    least=HELD_SECONDS, num_moved=lambda: self._session.num_moved,
                )  # fmt: skip
            except _SilentError:
                self._is_stuck = True
                raise
            except ServerUnavailableError as error:
                self._waiting.begin("the server to come back", str(error))
                if backoff == FIRST_BACKOFF and not isinstance(error.__cause__, TimeoutError):
                    self._patience.since = time.monotonic()  # the server was there until now
                if self._session.num_moved > moved:  # there was contact in the meantime
                    deadline, backoff = time.monotonic() + GLITCH_SECONDS, FIRST_BACKOFF
                    moved, self._patience.since = self._session.num_moved, time.monotonic()
                if time.monotonic() > deadline or self._patience.left() <= 0:
                    raise
                if self._end or self._stop.wait(backoff):
                    return None
                backoff = min(2 * backoff, LAST_BACKOFF)
            else:
                if result is not None:
                    self._waiting.end()
                return result
