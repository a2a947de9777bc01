"""A client's registration with a server, from joining to leaving: it answers messages."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TypeAlias, TypeVar

from flwr.app import Message

from fedshelf.core.errors import FedShelfError, RefusedError, RosterError
from fedshelf.core.messages import Failure, MaskingStage
from fedshelf.deploy.client_part import ClientPart, Ended, EndKind, failure_text
from fedshelf.deploy.connection_errors import ServerUnavailableError, SessionLostError
from fedshelf.deploy.flower_client import FleetSession
from fedshelf.deploy.patience import Patience, SilentError
from fedshelf.deploy.records import Control, Envelope, SendHook, WireMessage, open_records, to_parcel
from fedshelf.deploy.waiting import Availability, WaitReporter
from fedshelf.privacy.ledger import Ledger

logger = logging.getLogger(__name__)

FIRST_BACKOFF, LAST_BACKOFF = 0.5, 5.0  # seconds between attempts within a registration
GLITCH_SECONDS = 20.0  # a shorter interruption does not end a registration
PAUSE_SECONDS = 1.0  # between attempts to wait on an unreachable server
HELD_SECONDS = 5.0  # for a request that a server may hold for a second


IDLE_ADVICE = (
    "this store is connected and has nothing to do; the server's output, and 'fedshelf runs show' there, tell which "
    "stores it waits for"
)
TRANSFER_ADVICE = "the network is slow or interrupted, or the server is busy"

AnswerHook: TypeAlias = Callable[[WireMessage, int], None]

_T = TypeVar("_T")


class Registration:
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
        patience: Patience,
        ledger: Ledger | None = None,
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
        self._ledger = ledger
        self._over = threading.Event()
        self._end = ""
        self._is_stuck = False

    def run(self) -> Ended | None:
        """Answer messages; return None when the registration is lost or the active hours end."""
        watch = threading.Thread(target=self._watch, name="fedshelf-wait", daemon=True)
        watch.start()
        try:
            while not self._end and self._availability.is_open() and not self._stop.is_set():
                message = self._with_retries("work from the server", self._session.pull, IDLE_ADVICE)
                if message is None or not self._availability.is_open():
                    continue  # outside active hours, new messages are not started: the server sees this client leave
                ended = self._answer(message)
                self.num_answered += 1
                if ended is not None:
                    return ended
            if not self._end:
                return None
            return self._last_word() or Ended(kind=EndKind.CLOSED, reason=self._end)
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
                with contextlib.suppress(SilentError):
                    self._patience.bound(self._session.leave, afterwards=lambda answer: None)

    def _last_word(self) -> Ended | None:
        """What the server has told this client alone, if the end of the run, told to all, has overtaken it."""
        with contextlib.suppress(ServerUnavailableError, SessionLostError, RefusedError):
            message = self._session.pull()
            if message is not None and isinstance(open_records(message.content), Control):
                return self._answer(message)
        return None

    def _answer(self, message: Message) -> Ended | None:
        """Fetch the message's blob, handle the message, and send the answer, blob first."""
        asked, blob = None, None
        answer: WireMessage
        try:
            asked = open_records(message.content)
            if isinstance(asked, Envelope) and asked.header.fields.get("stage") == MaskingStage.KEYS:
                self._with_retries("the roster", self._session.refresh_roster)
            if isinstance(asked, Envelope) and asked.external_blob:
                blob = self._part.find_blob(asked.external_blob) or self._with_retries(
                    "the model to arrive", partial(self._session.fetch, asked.external_blob), TRANSFER_ADVICE
                )
                if blob is None:
                    return None  # withdrawn, or this registration has ended
            answer, ended = self._part.answer_to(asked, blob)
        except (ServerUnavailableError, RosterError):
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
        ledger, release = self._ledger, None
        if ledger is not None and not isinstance(answer, Control):
            release = ledger.intend(answer, parcel.payload(), blob=parcel.blob_digest, to=self._session.recipient)
        # Created once: a retry after a break must send the same message.
        reply = Message(parcel.records, reply_to=message)
        # By the server's clock: with this machine's, the engine could take the answer for one that is too old.
        reply.metadata.created_at, reply.metadata.ttl = message.metadata.created_at, message.metadata.ttl
        if parcel.blob.pieces:
            try:
                wanted = self._with_retries(
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
        head = None if ledger is None else ledger.head
        delivery = self._with_retries("the answer to arrive", lambda: self._session.send(reply, head), TRANSFER_ADVICE)
        if delivery is None:
            return False
        if ledger is not None:
            ledger.confirm(release, delivery.countersignature)
        self._on_answer(answer, parcel.num_header_bytes + parcel.blob.size)
        return True

    def _watch(self) -> None:
        while not self._over.is_set():
            try:
                self._end = self._session.wait_for_end() or self._end
            except (FedShelfError, SessionLostError, AttributeError):  # AttributeError: closed while leaving
                self._over.wait(PAUSE_SECONDS)  # the main thread handles it

    def _with_retries(self, what: str, request: Callable[[], _T], advice: str = "") -> _T | None:
        """Retry `request` through interruptions shorter than `GLITCH_SECONDS`.

        A result of None leaves the client waiting for `what`.

        Returns:
            The request's result, or None if this registration is to end.
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
            except SilentError:
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
